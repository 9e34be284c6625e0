"""Training speed of a detector on generated images.

``python -m focalnet_det.analysis.detector_speed --config FILE --data FOLDER`` prints one line of
JSON. One process for one detector: the memory of one does not show in the next.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.utils.events import EventStorage

from ..data.datasets import register_shapes
from ..data.shapes import make_shapes
from ..data.shapes_scene import THING_CLASSES
from ..engine.experiment import load_config, read_experiment
from ..engine.train import Trainer

# Steps with the profiler, after those that are timed.
PROFILED = 5


@dataclasses.dataclass(frozen=True)
class DetectorTiming:
    """Training of one detector.

    Attributes:
        name: of the recipe, and the path if one is forced.
        images_per_second: median over the steps.
        data_share: of the time, spent waiting for the loader.
        busy_share: of the time, in which kernels ran on the GPU; None on CPUs.
        peak_bytes: of the GPU's allocator; None on CPUs.
    """

    name: str
    images_per_second: float
    data_share: float
    busy_share: float | None
    peak_bytes: int | None


def build_trainer(args: argparse.Namespace) -> Trainer:
    """The recipe on generated images as they are, which are of one size."""
    overrides = [
        f"train.device={args.device}",
        f"train.precision={args.precision}",
        "train.seed=0",
        "dataloader.train.datasets=shapes_train",
        f"dataloader.train.batch_size={args.batch_size}",
        f"dataloader.train.num_workers={args.workers}",
        f"model.roi_heads.num_classes={len(THING_CLASSES)}",
    ]
    cfg: Any = load_config(args.config, overrides)
    cfg.dataloader.train.augmentations = [L(T.RandomFlip)()]
    experiment = read_experiment(cfg)
    model = experiment.model().to(args.device).train()
    return Trainer(
        model, experiment.train_loader(), experiment.optimizer(model), experiment.options
    )


def measure(trainer: Trainer, name: str, *, warm_up: int, steps: int) -> DetectorTiming:
    """Times ``steps`` training steps after some to warm up, and then profiles a few."""
    device = torch.device(trainer.options.device)
    batch = trainer.data_loader.batch_size
    seconds = []
    with EventStorage() as trainer.storage:
        for step in range(warm_up + steps):
            if step == warm_up and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds.append(_timed(trainer, device))
        waits = [value for value, _ in trainer.storage.history("data_time").values()]
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        busy = _busy_share(trainer, device) if device.type == "cuda" else None
    timed = seconds[warm_up:]
    return DetectorTiming(
        name=name,
        images_per_second=batch / sorted(timed)[len(timed) // 2],
        data_share=sum(waits[warm_up:]) / sum(timed),
        busy_share=busy,
        peak_bytes=peak,
    )


def _timed(trainer: Trainer, device: torch.device) -> float:
    start = time.perf_counter()
    trainer.run_step()
    trainer.storage.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _busy_share(trainer: Trainer, device: torch.device) -> float:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wall = sum(_timed(trainer, device) for _ in range(PROFILED))
    busy = sum(event.self_device_time_total for event in profile.key_averages())
    return busy * 1e-6 / wall


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the images if they are not there, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args(arguments)
    os.environ["DETECTRON2_DATASETS"] = str(args.data)
    make_shapes(
        args.data / "shapes", train=4 * args.batch_size, val=1, size=(args.size[1], args.size[0]),
        seed=0, workers=max(1, args.workers),
    )  # fmt: skip
    register_shapes()
    trainer = build_trainer(args)
    name, forced = Path(args.config).stem, os.environ.get("FOCALNET_DET_OPS")
    name = f"{name}, {forced}" if forced else name
    timing = measure(trainer, name, warm_up=args.warm_up, steps=args.steps)
    print(json.dumps(dataclasses.asdict(timing)))


if __name__ == "__main__":
    main()
