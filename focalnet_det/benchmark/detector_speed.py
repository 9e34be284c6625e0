"""Measure the training speed of a detector on generated images.

``python -m focalnet_det.benchmark.detector_speed --config FILE --data FOLDER`` prints one line of
JSON. Each detector runs in a separate process, so that memory measurements are independent.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.utils.events import EventStorage

from ..data.registry import register_shapes
from ..data.shapes.generate import make_shapes
from ..data.shapes.scene import THING_CLASSES
from ..engine.trainer import Trainer
from ..experiment import load_config, read_experiment

# Profiled steps after the timed ones.
PROFILED = 5
# Modules to time individually, if present.
PARTS = ("backbone.bottom_up", "backbone", "proposal_generator", "roi_heads")
# Operators that synchronize the host with the GPU.
WAITING = ("aten::_local_scalar_dense", "aten::nonzero")


@dataclasses.dataclass(frozen=True)
class DetectorTiming:
    """Training speed of a detector.

    Attributes:
        name: recipe, and the backend if one is forced.
        images_per_second: median over the steps.
        data_share: fraction of the time spent waiting for data.
        busy_share: fraction of the time in which GPU kernels ran; None on CPUs.
        peak_bytes: of the GPU allocator; None on CPUs.
        parts: seconds per step in the forward pass of each of ``PARTS``, including submodules, and
            in the optimizer; on a GPU, kernel time.
        waits: synchronizations of the host per step.
    """

    name: str
    images_per_second: float
    data_share: float
    busy_share: float | None
    peak_bytes: int | None
    parts: dict[str, float]
    waits: float


def build_trainer(args: argparse.Namespace) -> Trainer:
    """Build the trainer of a recipe on generated images of a single size, without resizing."""
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
    """Time ``steps`` training steps after a warm-up, then profile ``PROFILED`` more."""
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
        profile = _profile(trainer, device)
    timed = seconds[warm_up:]
    return DetectorTiming(
        name=name,
        images_per_second=batch / sorted(timed)[len(timed) // 2],
        data_share=sum(waits[warm_up:]) / sum(timed),
        peak_bytes=peak,
        **profile,
    )


def _timed(trainer: Trainer, device: torch.device) -> float:
    start = time.perf_counter()
    trainer.run_step()
    trainer.storage.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _profile(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """Profile some steps, and return the resulting fields of :class:`DetectorTiming`."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _labels(trainer.inner), torch.profiler.profile(activities=activities) as profile:
        wall = sum(_timed(trainer, device) for _ in range(PROFILED))
    return summary(profile.key_averages(), wall, on_gpu=on_gpu)


def summary(events: Iterable[Any], wall: float, *, on_gpu: bool) -> dict[str, Any]:
    """Compute the fields of :class:`DetectorTiming` from a profile of ``PROFILED`` steps.

    Args:
        events: of ``key_averages()``. On a GPU, kernels are separate events, and a label occurs
            twice: on the host, with the kernels launched under it, and on the GPU, from its first
            to its last kernel, including gaps.
        wall: seconds of all steps.
        on_gpu: use kernel time instead of host time.
    """
    host, device = {}, []
    for event in events:
        if event.device_type.name == "CPU":
            host[event.key] = event
        elif not getattr(event, "is_user_annotation", False):
            device.append(event)
    total = "device_time_total" if on_gpu else "cpu_time_total"
    return {
        "busy_share": sum(e.self_device_time_total for e in device) * 1e-6 / wall
        if on_gpu
        else None,
        "parts": {
            name: getattr(host[name], total) * 1e-6 / PROFILED
            for name in (*PARTS, "optimizer")
            if name in host
        },
        "waits": sum(host[name].count for name in WAITING if name in host) / PROFILED,
    }


@contextlib.contextmanager
def _labels(model: torch.nn.Module) -> Iterator[None]:
    """Label the forward passes of ``PARTS`` in a profile."""
    running = []

    def begin(name: str) -> None:
        running.append(torch.profiler.record_function(name).__enter__())

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    modules, handles = dict(model.named_modules()), []
    for name in PARTS:
        if name in modules:
            start = functools.partial(begin, name)
            handles.append(modules[name].register_forward_pre_hook(lambda *_, start=start: start()))
            handles.append(modules[name].register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate the images if necessary, measure, and print JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the line there too")
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
    text = json.dumps(dataclasses.asdict(timing))
    print(text)
    if args.json is not None:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
