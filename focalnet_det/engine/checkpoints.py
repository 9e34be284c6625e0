"""Checkpoints: whole or absent, the last few and the best, and with everything that a run needs."""

import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from torch import nn

from ..checkpoint.growth import saved_growth, set_growth

logger = logging.getLogger("focalnet_det")


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but a file is whole or absent, never torn.

    A network whose focal levels were growing when it was saved goes on growing.
    """

    def _load_model(self, checkpoint: Any) -> Any:
        set_growth(self.model, saved_growth(checkpoint["model"]))
        return super()._load_model(checkpoint)

    def save(self, name: str, **kwargs: Any) -> None:
        """As in fvcore, by way of a temporary name. To be called in all processes.

        Raises: OSError with the path if the file cannot be written; earlier files stay as they are.
        """
        # The states of the parts are gathered from all processes.
        data: dict[str, Any] = {
            key: part.state_dict() for key, part in self.checkpointables.items()
        }
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir) / f"{name}.pth"
        write_atomically(path, {"model": self.model.state_dict(), **data, **kwargs})
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As in fvcore, by way of a temporary name."""
        path = Path(self.save_dir) / "last_checkpoint"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(last_filename_basename)
        temporary.replace(path)


def write_atomically(path: Path, data: dict[str, Any]) -> None:
    """``torch.save`` to a temporary name, then renamed.

    Raises: OSError that says what to do; what was there stays as it is.
    """
    temporary = path.with_suffix(".pth.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"Could not write the checkpoint {path}: {error}. Free some space and continue "
            "with --resume; the checkpoints before it are untouched."
        ) from error


class CheckpointHook(HookBase):
    """Saves every so often and at the end, keeps the last few and, if asked, the best.

    Args:
        checkpointer: where to.
        period: iterations between two checkpoints.
        keep: of the last checkpoints.
        best_metric: such as "segm/AP", "" for none; the best by it is kept as ``model_best.pth``.
    """

    def __init__(
        self, checkpointer: AtomicCheckpointer, *, period: int, keep: int, best_metric: str = ""
    ) -> None:
        self.checkpointer = checkpointer
        self.period = period
        self.keep = keep
        self.best_metric = best_metric
        self.best: float | None = None

    def after_step(self) -> None:
        """Saves where it is due; the last iteration is saved as ``model_final.pth``."""
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.checkpointer.save("model_final", iteration=self.trainer.iter)
        elif done % self.period == 0:
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
            if comm.is_main_process():
                self._drop_old()

    def after_evaluation(self, model: nn.Module, results: dict[str, Any]) -> None:
        """Keeps a model if it is the best so far.

        Args:
            model: that was evaluated.
            results: of the first test set, {task: {metric: value}}; empty but in one process.
        Raises: KeyError if there is no such metric.
        """
        if not self.best_metric or not comm.is_main_process():
            return
        task, _, metric = self.best_metric.partition("/")
        if task not in results or metric not in results[task]:
            known = [f"{t}/{m}" for t, metrics in results.items() for m in metrics]
            raise KeyError(
                f"No metric {self.best_metric!r} to keep the best by: {', '.join(known)}."
            )
        value = float(results[task][metric])
        # AP is NaN where nothing could be counted.
        if value == value and (self.best is None or value > self.best):
            self.best = value
            path = Path(self.checkpointer.save_dir) / "model_best.pth"
            write_atomically(path, {"model": model.state_dict()})
            logger.info("Best %s so far: %.2f. Kept as %s.", self.best_metric, value, path)

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.best = state["best"]

    def _drop_old(self) -> None:
        folder = Path(self.checkpointer.save_dir)
        found = sorted(p for p in folder.glob("model_*.pth") if re.fullmatch(r"model_\d+", p.stem))
        for path in found[: -self.keep]:
            path.unlink(missing_ok=True)


def random_states(device: str) -> dict[str, Any]:
    """The random number generators of this process."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        # Lists and numbers only: a checkpoint loads without unpickling arrays.
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state(),
    }
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: str) -> None:
    """The inverse of :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if device.startswith("cuda") and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
