"""Write and read the checkpoints of a run: the latest ones, the best one, and the final one."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from .. import __version__
from ..atomic import replacing, write_text
from ..checkpoint.files import check_file
from ..checkpoint.global_level import saved_global_levels, set_global_levels
from .numerics import NumericalTrouble, all_finite, first_not_finite
from .resume import check_same_tensors, config_changes, flatten, named
from .run_folder import LAST, in_first_process
from .sharding import gathered, is_sharded, load_whole

logger = logging.getLogger("focalnet_det")

FINAL = "model_final.pth"
BEST = "model_best.pth"
AVERAGED = "model_ema.pth"
BROKEN = ".broken"


class TrainerState(Protocol):
    """Training state other than the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state. Collective: called in all processes."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""


@dataclass(frozen=True)
class RunFacts:
    """Description of a run in its checkpoints.

    Attributes:
        id: id in ``run.json``.
        config: text of the full config.
        data: fingerprint of the training data.
        classes: class names, in the model's order; () if the data has none.
        metadata: Detectron2's metadata of the classes.
    """

    id: str
    config: str
    data: str
    classes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, str]:
        """Return the entries of a checkpoint, including the version of this package."""
        return {"id": self.id, "config": self.config, "data": self.data, "version": __version__}

    def described(self) -> dict[str, Any]:
        """Return what a file of weights needs to be used without its run, by ``Predictor``."""
        return {
            "run": self.as_dict(),
            "class_names": list(self.classes),
            "metadata": plain(self.metadata),
        }


class Checkpoints:
    """Checkpointer of a run.

    A file contains ``model``, ``trainer`` (see :class:`TrainerState`),
    ``iteration`` (the last completed one, from 0), ``run``, ``class_names``,
    ``metadata`` (see :class:`RunFacts`) and ``pending``:
    the scalars of an iteration whose evaluation was not yet complete, None for none.

    Args:
        folder: output folder of the run.
        model: without its DistributedDataParallel wrapper.
        trainer: the remaining state.
        facts: description of this run.
        keep: number of latest checkpoints to keep.
    """

    def __init__(
        self, folder: Path, model: nn.Module, trainer: TrainerState, facts: RunFacts, *, keep: int
    ) -> None:
        self.folder = folder
        self.model = model
        self.trainer = trainer
        self.facts = facts
        self.keep = keep
        self.best: float | None = None

    def save(
        self, iteration: int, *, final: bool = False, pending: Mapping[str, float] | None = None
    ) -> None:
        """Write a checkpoint, then delete the oldest. Collective: call it in all processes.

        Args:
            iteration: the last completed one.
            final: whether it is the last one of the training.
            pending: see the class.
        Raises: OSError with the path if the file cannot be written; earlier files are unaffected.
            NumericalTrouble if a weight is not finite; nothing is written then.
        """
        # Outside of `write`, since they are collective calls.
        state = self.trainer.state_dict()
        weights = gathered(self.model.state_dict())

        def write() -> None:
            check_finite(weights, iteration)
            if "ema" in state:
                check_finite(state["ema"], iteration)
            name = FINAL if final else f"model_{iteration:07d}.pth"
            content = {"model": weights, "trainer": state, "iteration": iteration}
            owed = {"pending": None if pending is None else dict(pending)}
            write_checkpoint(self.folder / name, content | self.facts.described() | owed)
            self._point_at(name)
            self._drop_old()

        in_first_process(write)

    def _point_at(self, name: str) -> None:
        # Read by Detectron2's tools.
        try:
            write_text(self.folder / LAST, name)
        except OSError as error:
            raise OSError(could_not_write(self.folder / LAST, error)) from error

    def _drop_old(self) -> None:
        numbered = sorted(numbered_checkpoints(self.folder))
        for _, path in numbered[: -self.keep]:
            path.unlink(missing_ok=True)

    def save_best(self, model: nn.Module, metric: str, score: float | None, iteration: int) -> None:
        """Save a model if its score is the highest so far. Call it in the main process only.

        The file includes the score, for resumed runs.

        Args:
            model: the evaluated model.
            metric: name of the metric.
            score: of the model; None or NaN if undefined.
            iteration: the last completed one.
        """
        if score is None or score != score or (self.best is not None and score <= self.best):
            return
        weights = model.state_dict()
        check_finite(weights, iteration)
        content = {"model": weights, "metric": metric, "score": score, "iteration": iteration}
        write_checkpoint(self.folder / BEST, content | self.facts.described())
        self.best = score
        logger.info("Best %s so far: %.2f. Saved to %s.", metric, score, self.folder / BEST)

    def read_best(self, metric: str) -> None:
        """Read the score of the best model of this run, if there is one."""
        path = self.folder / BEST
        self.best = None
        if not metric or not path.exists():
            return
        problem = check_file(path)
        if problem is not None:
            logger.warning(
                "%s is damaged (%s). The next evaluated model replaces it.", path, problem
            )
            return
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if content.get("run", {}).get("id") == self.facts.id and content.get("metric") == metric:
            self.best = float(content["score"])

    def resume(self) -> dict[str, Any] | None:
        """Load the latest intact checkpoint. Collective: call it in all processes.

        Returns: its content without the weights, None if there is no checkpoint.
        Raises: ValueError if all are damaged, or the latest intact one does not match this run.
        """
        path = in_first_process(lambda: newest_whole(self.folder))
        if path is None:
            return None
        content = read_everywhere(path)
        try:
            self._load(content)
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be resumed with this config: {error}. Use the config of the "
                "original run, or start a new run from its weights with another --output and "
                f"train.init_checkpoint={path}."
            ) from error
        content.pop("model")
        # Keeps the best model associated with this run even if run.json was lost.
        run_id = content.get("run", {}).get("id", self.facts.id)
        self.facts = replace(self.facts, id=run_id)
        return content

    def _load(self, content: dict[str, Any]) -> None:
        facts = content.get("run", {})
        self._compare(facts)
        state = content["model"]
        levels = saved_global_levels(state)
        if levels and is_sharded(self.model):
            raise ValueError("its network is still growing, which sharding does not allow")
        set_global_levels(self.model, levels)
        check_same_tensors(state, self.model.state_dict(), "the weights")
        load_whole(self.model, state)
        self.trainer.load_state_dict({**content, **content["trainer"]})

    def _compare(self, facts: Mapping[str, str]) -> None:
        if not facts:
            return
        saved, now = flatten(facts["config"]), flatten(self.facts.config)
        if facts["version"] != __version__:
            logger.warning(
                "The checkpoint was written by focalnet_det %s, this is %s.",
                facts["version"],
                __version__,
            )
            # Options that only one of the versions has are not compared.
            common = saved.keys() & now.keys()
            saved, now = {k: saved[k] for k in common}, {k: now[k] for k in common}
        applied, refused = config_changes(saved, now)
        if refused:
            raise ValueError(named(refused))
        if facts["data"] != self.facts.data:
            raise ValueError(f"the training data was {facts['data']}, but is now {self.facts.data}")
        if applied:
            logger.info("Config changes since the checkpoint: %s.", "; ".join(applied))


def plain(value: Any) -> Any:
    """Return nested containers as dicts and lists, which any reader of checkpoints takes."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_finite(state: Mapping[str, Any], iteration: int) -> None:
    """Check that all tensors of a state dict are finite.

    Raises: NumericalTrouble with the name of the first one that is not.
    """
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    if not all_finite(tensors.values()):
        raise NumericalTrouble(
            f"Iteration {iteration + 1}: {first_not_finite(tensors.items())} is not finite, so no "
            "checkpoint was saved. Earlier checkpoints are intact. Lower the learning rate or set "
            "train.clip_norm, then continue with --resume.",
            iteration,
        )


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a file by ``torch.save`` atomically.

    Raises: OSError with a remedy; an existing file is unaffected.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # After a failed write, PyTorch's writer fails again on close and hides the reason.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(could_not_write(path, reason)) from error


def could_not_write(path: Path, error: Exception) -> str:
    """Format an error message about a file that could not be written."""
    return (
        f"Could not write {path}: {error}. Free some disk space and continue with --resume. "
        "Earlier checkpoints are intact."
    )


def numbered_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield (iteration, path) of the periodic checkpoints, in any order."""
    for path in folder.glob("model_*.pth"):
        match = re.fullmatch(r"model_(\d+)", path.stem)
        if match:
            yield int(match[1]), path


def newest_whole(folder: Path) -> Path | None:
    """Return the latest intact checkpoint, None if there is no checkpoint at all.

    Later damaged ones are renamed to ``*.broken`` with a warning.

    Raises: ValueError if there are checkpoints, but none is intact.
    """
    numbered = [path for _, path in sorted(numbered_checkpoints(folder), reverse=True)]
    final = [folder / FINAL] if (folder / FINAL).is_file() else []
    problems: list[tuple[Path, str]] = []
    for path in [*final, *numbered]:
        problem = training_problem(path)
        if problem is None:
            for broken, text in problems:
                logger.warning("Skipped %s: %s. Renamed it to *%s.", broken, text, BROKEN)
                broken.rename(broken.with_name(broken.name + BROKEN))
            return path
        problems.append((path, problem))
    if problems:
        details = "; ".join(f"{path.name}: {text}" for path, text in problems)
        raise ValueError(
            f"No checkpoint in {folder} can be resumed ({details}). Start a new run without "
            "--resume; the files are moved, not deleted."
        )
    return None


def training_problem(path: Path) -> str | None:
    """Return the reason why training cannot resume from a file, None if it can."""
    problem = check_file(path)
    if problem is not None:
        return problem
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files raise almost anything
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"it cannot be read ({first_line})"
    if not isinstance(content, dict) or not {"model", "trainer"} <= content.keys():
        return "it contains only weights, not a training state"
    return None


def read_everywhere(path: Path) -> dict[str, Any]:
    """Read a checkpoint in every process; broadcast it to machines that lack the file."""
    has_file = comm.all_gather(path.is_file())
    content: Any = None
    if path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not all(has_file):
        holder = [content if comm.is_main_process() else None]
        torch.distributed.broadcast_object_list(holder)
        content = holder[0]
    return dict(content)


def best_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a run, None if there is none.

    The best model by ``train.keep_best`` comes first, then averaged weights, then the last ones.
    """
    numbered = [file for _, file in sorted(numbered_checkpoints(folder), reverse=True)]
    files = (folder / BEST, folder / AVERAGED, folder / FINAL, *numbered)
    return next((file for file in files if file.is_file()), None)
