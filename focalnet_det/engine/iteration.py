"""Set the learning rate, evaluate, write metrics and save checkpoints after each update.

No metrics are lost in this order: a checkpoint is written after the metrics of its iteration, or
marks them as pending.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine.train_loop import HookBase
from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.param_scheduler import ParamScheduler

from ..atomic import write_text
from .checkpoints import Checkpoints, could_not_write
from .run_folder import METRICS
from .signals import RunStopped


class LearningRate(HookBase):
    """Multiply the initial learning rate of each parameter group by a schedule.

    The hook is stateless: the rate depends on the config and the iteration alone, even in a run
    that is resumed with another rate or length.

    Args:
        multiplier: schedule, as a function of the training progress, 0..1.
    """

    def __init__(self, multiplier: ParamScheduler) -> None:
        self.multiplier = multiplier

    def before_train(self) -> None:
        """Set the learning rates of the first iteration."""
        groups = self.trainer.optimizer.param_groups
        # After a rewind, `lr` is already scaled, but `initial_lr` is present.
        self.rates = [group.setdefault("initial_lr", group["lr"]) for group in groups]
        # The metrics show the learning rate of the largest group.
        self.logged_group = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
        self._set(self.trainer.start_iter)

    def after_step(self) -> None:
        """Log the current learning rate and set the next one."""
        rate = self.trainer.optimizer.param_groups[self.logged_group]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self._set(self.trainer.iter + 1)

    def _set(self, iteration: int) -> None:
        factor = self.multiplier(iteration / self.trainer.max_iter)
        for group, rate in zip(self.trainer.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor


class EndOfIteration(HookBase):
    """Evaluate, write metrics and save checkpoints periodically.

    The state is saved before an evaluation, so that a run killed during it repeats only the
    evaluation. Register this hook after all hooks that write metrics or change state.

    Args:
        checkpoints: of the run.
        evaluate: evaluates the model after an iteration; returns scores by name.
        save_period, eval_period, log_period: iterations; 0 for the last iteration only.

    Attributes:
        progress, writers: writers of the progress line and of metrics; main process only.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        evaluate: Callable[[int], Mapping[str, float]],
        *,
        save_period: int,
        eval_period: int,
        log_period: int,
    ) -> None:
        self.checkpoints = checkpoints
        self.evaluate = evaluate
        self.save_period = save_period
        self.eval_period = eval_period
        self.log_period = log_period
        self.progress: EventWriter | None = None
        self.writers: Sequence[EventWriter] = ()

    def after_step(self) -> None:
        """Perform the actions that are due.

        Raises: RunStopped, after saving the state, if a stop signal was received.
        """
        iteration, done = self.trainer.iter, self.trainer.iter + 1
        last = done >= self.trainer.max_iter
        evaluation = last or is_due(done, self.eval_period)
        stop = self.trainer.stop_signal
        log = is_due(done, self.log_period)
        if self.progress is not None and (log or last):
            self.progress.write()
        if evaluation:
            self.checkpoints.save(iteration, final=last, pending=latest_scalars(iteration))
            if stop:
                raise RunStopped(stop, done)
            self.complete(iteration)
            return
        if log:
            self.write()
        if stop or is_due(done, self.save_period):
            self.checkpoints.save(iteration)
        if stop:
            raise RunStopped(stop, done)

    def complete(self, iteration: int) -> None:
        """Evaluate after an iteration, and write its metrics including the scores."""
        scores = self.evaluate(iteration)
        get_event_storage().put_scalars(**scores, smoothing_hint=False)
        self.write()

    def write(self) -> None:
        """Write the metrics of the iteration.

        Raises: OSError with a remedy if the disk is full.
        """
        for writer in self.writers:
            try:
                writer.write()
            except OSError as error:
                path = self.checkpoints.folder / METRICS
                raise OSError(could_not_write(path, error)) from error


def is_due(done: int, period: int) -> bool:
    """Return whether an action of this period, 0 for never, is due after ``done`` iterations."""
    return period > 0 and done % period == 0


def latest_scalars(iteration: int) -> dict[str, float]:
    """Return the metrics of an iteration by name."""
    latest = get_event_storage().latest()
    return {name: float(value) for name, (value, at) in latest.items() if at == iteration}


def flat_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Flatten nested results to ``dataset/task/metric``; drop NaN, which JSON does not support."""
    scores: dict[str, float] = {}
    for data, tasks in results.items():
        for task, metrics in tasks.items():
            for name, value in metrics.items():
                if math.isfinite(value):
                    scores[f"{data}/{task}/{name}"] = float(value)
    return scores


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Read (iteration, line) from a file of JSON lines; skip damaged lines."""
    lines = []
    for line in _text(path).splitlines():
        try:
            lines.append((int(json.loads(line)["iteration"]), line))
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return lines


def _text(path: Path) -> str:
    # A power failure may leave invalid bytes.
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def has_scores(path: Path, iteration: int) -> bool:
    """Return whether the line of an iteration contains evaluation scores."""
    rows = [json.loads(line) for at, line in read_lines(path) if at == iteration]
    return any("/" in name for row in rows for name in row)


def drop_lines_from(path: Path, iteration: int) -> None:
    """Remove the lines of an iteration and later ones from a file of JSON lines."""
    write_text(path, [line + "\n" for at, line in read_lines(path) if at < iteration])
