"""Report the progress of a training, profile it, and transition to new focal levels."""

import datetime
import logging
import math
import resource
import sys
import time
from pathlib import Path

import torch
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from detectron2.utils.events import (
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from ..atomic import replacing, write_text
from ..checkpoint.global_level import (
    advance_global_level,
    global_levels,
    growing_modulations,
    set_global_levels,
)
from ..experiment import Experiment
from .run_folder import METRICS

logger = logging.getLogger("focalnet_det")


class ProgressLine(EventWriter):
    """Writer of one log line per period: progress, ETA, losses, rate, speed, data time, memory.

    Args:
        max_iter: total iterations.
        batch_size: images per iteration, summed over all processes.
    """

    def __init__(self, max_iter: int, batch_size: int) -> None:
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.logger = logging.getLogger("focalnet_det.progress")
        self.last: tuple[int, float] | None = None

    def write(self) -> None:
        """Log a line."""
        storage = get_event_storage()
        done = min(storage.iter + 1, self.max_iter)
        now = time.perf_counter()
        if self.last is not None and done <= self.last[0]:
            return  # writers are called again after the last iteration
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
    """Return the peak memory of the GPU, or of this process if no GPU is used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class GlobalLevelHook(HookBase):
    """Move the global contexts of an expanded network to its new focal levels gradually.

    The current level is a buffer of the network, so checkpoints include it.

    Args:
        iterations: iterations per level.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def before_train(self) -> None:
        """Log when the transition will end, if there is one."""
        inner = self.trainer.inner
        left = [inner.get_submodule(n).focal_level - at for n, at in global_levels(inner).items()]
        if not left:
            return
        end = self.trainer.start_iter + math.ceil(max(left) * self.iterations)
        logger.info("Global contexts transition to the new focal levels until iteration %d.", end)
        if end > self.trainer.max_iter:
            logger.warning(
                "Training ends earlier, at iteration %d. Only this package will be able to load "
                "the network. Set growth_iterations to at most %d, or train longer.",
                self.trainer.max_iter,
                (self.trainer.max_iter - self.trainer.start_iter) // max(left),
            )

    def after_step(self) -> None:
        """Advance the transition by one iteration."""
        inner, ema = self.trainer.inner, self.trainer.ema
        if next(growing_modulations(inner), None) is None:
            return
        advance_global_level(inner, 1 / self.iterations)
        levels = global_levels(inner)
        if ema is not None:
            set_global_levels(ema.module, levels)
        if not levels:
            logger.info("The transition to the new focal levels is complete.")


class ProfilerHook(HookBase):
    """Profile a range of iterations with PyTorch's profiler, and write a trace and a table.

    Args:
        folder: output folder for ``profile.json`` (for chrome://tracing or Perfetto) and
            ``profile.txt``; other ranks write ``profile.rank1.json`` and so on.
        first, last: iterations, from 0, both inclusive.
    Raises: ValueError if the range is empty.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        if not 0 <= first <= last:
            raise ValueError(f"profile must be (first, last) iterations, got ({first}, {last}).")
        self.folder, self.first, self.last = folder, first, last
        self.profiler: torch.profiler.profile | None = None

    def before_step(self) -> None:
        """Start at the first iteration of the range."""
        if self.trainer.iter == self.first:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()

    def after_step(self) -> None:
        """Stop and write the files after the last iteration of the range."""
        if self.profiler is None or self.trainer.iter < min(self.last, self.trainer.max_iter - 1):
            return
        self.profiler.stop()
        rank = comm.get_rank()
        stem = f"profile.rank{rank}" if rank else "profile"
        with replacing(self.folder / f"{stem}.json", durable=False) as temporary:
            self.profiler.export_chrome_trace(str(temporary))
        table = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        write_text(self.folder / f"{stem}.txt", table, durable=False)
        self.profiler = None


class OptionalWriter(EventWriter):
    """Wrapper that disables an optional writer when it fails.

    Args:
        writer: of metrics.
        name: for the warning.
    """

    def __init__(self, writer: EventWriter, name: str) -> None:
        self.writer: EventWriter | None = writer
        self.name = name

    def write(self) -> None:
        """Write, unless the writer is disabled."""
        self._try("write")

    def close(self) -> None:
        """Close the writer."""
        self._try("close")

    def _try(self, method: str) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)()
        except OSError as error:
            self.writer = None
            logger.warning("Disabled %s (%s). metrics.json is still written.", self.name, error)


class WandbWriter(EventWriter):
    """Writer of all scalars to Weights & Biases; requires ``pip install wandb``.

    Args:
        project: of Weights & Biases.
        folder: for its files.
        config: text of the full config.
    Raises: ImportError if wandb is not installed.
    """

    def __init__(self, project: str, folder: str, config: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "train.wandb_project requires Weights & Biases. Run pip install wandb."
            ) from error
        self.run = wandb.init(
            project=project, dir=folder, config={"config": config}, resume="allow"
        )
        self.sent = -1

    def write(self) -> None:
        """Send the scalars that are new since the last call."""
        storage = get_event_storage()
        rows: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest().items():
            if iteration > self.sent:
                rows.setdefault(iteration, {})[name] = value
        for iteration in sorted(rows):
            self.run.log(rows[iteration], step=iteration)
            self.sent = iteration

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def build_writers(experiment: Experiment, start: int) -> list[EventWriter]:
    """Build the writers of JSON lines, TensorBoard and, if enabled, Weights & Biases."""
    options = experiment.options
    writers: list[EventWriter] = [
        # Unsmoothed, because the window of a median would be lost when a run resumes.
        JSONWriter(str(Path(options.output_dir) / METRICS), window_size=1),
        OptionalWriter(TensorboardXWriter(options.output_dir, purge_step=start), "TensorBoard"),
    ]
    if options.wandb_project:
        writers.append(
            WandbWriter(options.wandb_project, options.output_dir, experiment.config_text)
        )
    return writers
