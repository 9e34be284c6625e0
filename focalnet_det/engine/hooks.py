"""Training hooks: the progress line and atomic checkpoints."""

import datetime
import logging
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.events import EventWriter, get_event_storage


class ProgressLine(EventWriter):
    """One line of text per period: progress, ETA, losses, rate, speed, data time, memory.

    Args:
        max_iter: of the training.
        batch_size: images per iteration, over all processes.
    """

    def __init__(self, max_iter: int, batch_size: int) -> None:
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.logger = logging.getLogger("focalnet_det.progress")
        self.last: tuple[int, float] | None = None

    def write(self) -> None:
        """Called by Detectron2's PeriodicWriter."""
        storage = get_event_storage()
        done = min(storage.iter + 1, self.max_iter)
        now = time.perf_counter()
        if self.last is not None and done <= self.last[0]:
            return  # after the last iteration the writers are called once more
        parts = [f"{done}/{self.max_iter}"]
        seconds = self._seconds_per_iteration(done, now)
        if seconds is not None:
            left = datetime.timedelta(seconds=int(seconds * (self.max_iter - done)))
            parts.append(f"eta {left}")
        losses = {
            name: history.median(20)
            for name, history in storage.histories().items()
            if "loss" in name
        }
        total = losses.pop("total_loss", None)
        if total is not None:
            short = ", ".join(f"{_short(name)} {value:.3f}" for name, value in losses.items())
            parts.append(f"loss {total:.3f}" + (f" ({short})" if len(losses) > 1 else ""))
        if "lr" in storage.histories():
            parts.append(f"lr {storage.history('lr').latest():.2e}")
        if seconds is not None:
            parts.append(f"{self.batch_size / seconds:.1f} img/s")
        if "data_time" in storage.histories():
            parts.append(f"data {storage.history('data_time').avg(20):.3f} s")
        parts.append(f"mem {_peak_memory_gib():.1f} GiB")
        self.logger.info("  ".join(parts))

    def _seconds_per_iteration(self, done: int, now: float) -> float | None:
        last, self.last = self.last, (done, now)
        if last is None:
            return None
        return (now - last[1]) / (done - last[0])


def _short(name: str) -> str:
    return name.removeprefix("loss_")


def _peak_memory_gib() -> float:
    """Peak memory of the GPU, or of this process where there is none."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but a file is whole or absent, never torn."""

    def save(self, name: str, **kwargs: Any) -> None:
        """As in fvcore, by way of a temporary name.

        Raises: OSError with the path if the file cannot be written; earlier files stay as they are.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict()}
        for key, part in self.checkpointables.items():
            data[key] = part.state_dict()
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
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
        self.tag_last_checkpoint(path.name)
