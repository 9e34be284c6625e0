"""What follows each update: the next rate, evaluation, metrics and checkpoint, in that order.

The order loses nothing: a checkpoint is written when the metrics of its iteration are on disk, or
it says that they are still owed.
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
    """Sets the rate of each group to its own times the multiplier of the iteration.

    It has no state: the rate follows from the config and the iteration alone, also in a run that
    is resumed with another rate or length.

    Args:
        multiplier: of the rate, by the share of the training that is done, 0..1.
    """

    def __init__(self, multiplier: ParamScheduler) -> None:
        self.multiplier = multiplier

    def before_train(self) -> None:
        """Set the rates of the first iteration."""
        groups = self.trainer.optimizer.param_groups
        # After a rewind the groups still know their own.
        self.rates = [group.setdefault("initial_lr", group["lr"]) for group in groups]
        # The largest group stands for all in the metrics.
        self.shown = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
        self._set(self.trainer.start_iter)

    def after_step(self) -> None:
        """Note the rate that was used and set the next one."""
        rate = self.trainer.optimizer.param_groups[self.shown]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self._set(self.trainer.iter + 1)

    def _set(self, iteration: int) -> None:
        factor = self.multiplier(iteration / self.trainer.max_iter)
        for group, rate in zip(self.trainer.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor


class EndOfIteration(HookBase):
    """Evaluates, writes metrics and saves, where they are due.

    Before an evaluation the state is saved with what is owed, so that a run that is killed in it
    repeats the evaluation and nothing else. Register it after all hooks that write metrics or
    change state.

    Args:
        checkpoints: of the run.
        evaluate: evaluate the model after an iteration; returns the numbers for the metrics.
        save_period, eval_period, log_period: iterations; 0 for the last iteration only.

    Attributes:
        progress, writers: of the line on the screen, and of metrics; in the first process.
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
        """Do what is due.

        Raises: RunStopped once the state is saved, if a signal asks for it.
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
        """Evaluate after an iteration, and write its metrics with the scores."""
        scores = self.evaluate(iteration)
        get_event_storage().put_scalars(**scores, smoothing_hint=False)
        self.write()

    def write(self) -> None:
        """Write the metrics of the iteration.

        Raises: OSError that says what to do if the disk is full.
        """
        for writer in self.writers:
            try:
                writer.write()
            except OSError as error:
                path = self.checkpoints.folder / METRICS
                raise OSError(could_not_write(path, error)) from error


def is_due(done: int, period: int) -> bool:
    """Return whether something of this period, 0 for none, is due after so many iterations."""
    return period > 0 and done % period == 0


def latest_scalars(iteration: int) -> dict[str, float]:
    """Return the metrics of an iteration by name."""
    latest = get_event_storage().latest()
    return {name: float(value) for name, (value, at) in latest.items() if at == iteration}


def flat_scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of nested results by ``set/task/metric``.

    A class that does not occur has no AP, and JSON no NaN.
    """
    scores: dict[str, float] = {}
    for data, tasks in results.items():
        for task, metrics in tasks.items():
            for name, value in metrics.items():
                if math.isfinite(value):
                    scores[f"{data}/{task}/{name}"] = float(value)
    return scores


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Read (iteration, line) from a file of JSON lines; damaged ones are left out."""
    lines = []
    for line in _text(path).splitlines():
        try:
            lines.append((int(json.loads(line)["iteration"]), line))
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return lines


def _text(path: Path) -> str:
    # A power cut may leave bytes that are no text.
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def has_scores(path: Path, iteration: int) -> bool:
    """Return whether the line of an iteration holds the scores of an evaluation."""
    rows = [json.loads(line) for at, line in read_lines(path) if at == iteration]
    return any("/" in name for row in rows for name in row)


def drop_lines_from(path: Path, iteration: int) -> None:
    """Take the lines of this iteration and later ones out of a file of JSON lines."""
    kept = [line + "\n" for at, line in read_lines(path) if at < iteration]
    write_text(path, kept)
