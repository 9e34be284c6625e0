"""A training of milliseconds that goes through the whole engine, also as a program.

The model has one weight per image coordinate and its loss is their product with the image, so the
weights after n iterations can be worked out by hand: each update subtracts rate times mean image.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from focalnet_det.data.loader import TrainLoader
from focalnet_det.engine import train as train_module
from focalnet_det.engine.run_folder import RunFolder
from focalnet_det.experiment import Experiment, TrainOptions
from focalnet_det.experiment.solver import Schedule

DATA = "toy"


class Product(nn.Module):
    """Loss: mean over the images of weight . image; plus noise that needs the random states."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.count += len(data)
        images = torch.stack([example["image"] for example in data])
        noise = torch.rand(2) * 1e-3
        return {"loss": (images @ self.weight + self.weight @ noise).mean()}


def batch(seed: int, iteration: int) -> list[dict[str, Any]]:
    """Two images of two numbers that depend on seed and iteration alone."""
    generator = torch.Generator().manual_seed(1000 * seed + iteration)
    return [
        {"image": torch.rand(2, generator=generator), "file_name": f"{iteration}_{i}.png"}
        for i in range(2)
    ]


def experiment(
    folder: Path,
    *,
    iterations: int = 8,
    read: Callable[[int, int], list[dict[str, Any]]] = batch,
    model: Callable[[], nn.Module] = Product,
    fingerprint: str = "toy data",
    config: str = "model: {width: 2}",
    tested: bool = True,
    lr: float = 0.1,
    **options: Any,
) -> Experiment:
    """The parts of a toy training."""
    defaults = {"period_unit": "iterations", "log_iterations": 1, "seed": 3, "eval_period": 0}
    defaults |= {"checkpoint_period": 2, "device": "cpu", "output_dir": str(folder), "pictures": 0}

    def stream(seed: int, start: int) -> Any:
        iteration = start
        while True:
            yield read(seed, iteration)
            iteration += 1

    return Experiment(
        model=model,
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=lr),
        schedule=Schedule(iterations=iterations, decay="cosine", warmup_iterations=0),
        train_loader=lambda: TrainLoader(
            stream, num_images=4, batch_size=2, fingerprint=fingerprint
        ),
        test_loaders={DATA: list} if tested else {},
        test_mapper=lambda: dict,
        options=TrainOptions(**(defaults | options)),
        config_text=config,
        settings=SimpleNamespace(train_sets=(), test_sets=()),
        given=None,
        with_settings=None,
        skeleton=None,
    )


def run(
    folder: Path,
    *,
    scores: Sequence[float] = (),
    resume: bool = False,
    overwrite: bool = False,
    evaluations: list[int] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Train a toy; its score after iteration n is the n-th of ``scores``, or else that of the
    weights.

    Args:
        evaluations: gets the numbers of images seen at each evaluation.
    """

    def evaluate(_: Experiment, model: nn.Module, *, between: Callable[[], None]) -> dict[str, Any]:
        between()
        # As loaders and visualizers do.
        random.random(), np.random.rand(), torch.rand(1)
        seen = int(model.count)
        if evaluations is not None:
            evaluations.append(seen)
        done = seen // 2
        score = scores[done - 1] if scores else float(model.weight.detach().sum())
        return {DATA: {"segm": {"AP": score, "APl": float("nan")}}}

    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    with (
        mock.patch.object(train_module, "evaluate", evaluate),
        RunFolder.open(folder, resume=resume, overwrite=overwrite) as opened,
    ):
        return train_module.train(experiment(folder, **fields), opened, resume=resume)


def main() -> None:
    """Train in a process of its own, slowly, always with ``--resume``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each iteration")
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()

    def read(seed: int, iteration: int) -> list[dict[str, Any]]:
        time.sleep(args.seconds)
        return batch(seed, iteration)

    run(
        args.folder,
        resume=not args.fresh,
        iterations=args.iterations,
        read=read,
        eval_period=3,
        keep_best="segm/AP",
        ema_decay=0.9,
    )


if __name__ == "__main__":
    main()
    sys.exit(0)
