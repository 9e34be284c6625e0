"""The folder of a run: who writes to it, and which run each of its files belongs to."""

import contextlib
import copy
import datetime
import json
import logging
import os
import pickle
import re
import shutil
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, TypeVar

from detectron2.utils import comm

from ..atomic import remove_leftovers, write_text

try:
    import fcntl
except ImportError:  # not on Windows, where runs are not locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("focalnet_det")

RECORD = "run.json"
LOCK = "run.lock"
CONFIG = "config.yaml"
METRICS = "metrics.json"
LAST = "last_checkpoint"
EARLIER = "earlier_runs"
EVALUATION = "evaluation"
# Everything that a run writes; other files in the folder are the user's and stay where they are.
OWNED = (
    *(RECORD, METRICS, LAST, "model_*.pth", "model_*.pth.broken", "trouble_*.pth"),
    *(CONFIG, "environment.txt", "log.txt", "log.txt.rank*", "events.out.tfevents.*"),
    *("curves.png", "predictions.png", "train_samples.png", "profile*.json", "profile*.txt"),
    *(EVALUATION, "wandb"),
)
# A folder without any of these holds nothing that took time to make.
WORTH_KEEPING = ("model_*.pth", METRICS, EVALUATION)
# Seconds to wait for the lock of a run that is just ending.
PATIENCE = 10.0

Result = TypeVar("Result")


@dataclass
class RunRecord:
    """What ``run.json`` says of a run.

    Attributes:
        id: of this run, also stored in its checkpoints.
        started: local time, ISO 8601.
        products: iterations done when each product of the end was made, by name.
        data_seed: of the order and augmentation of the images.
        data: fingerprint of the training data.
    """

    id: str
    started: str
    products: dict[str, int] = field(default_factory=dict)
    data_seed: int | None = None
    data: str = ""


class RunFolder:
    """The output folder of one run, locked while the run lasts.

    Use it as a context manager, in all processes; only the first one touches the disk.

    Attributes:
        path: the folder.
        record: what ``run.json`` says.
    """

    def __init__(self, path: Path, record: RunRecord, lock: "FileLock | None" = None) -> None:
        self.path = path
        self.record = record
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        resume: bool = False,
        evaluate: bool = False,
        overwrite: bool = False,
    ) -> "RunFolder":
        """Lock a folder and make it ready for a run. To be called in all processes.

        A new run in a folder that holds another one moves that one's files to
        ``earlier_runs/001`` and so on, so that nothing is mistaken for its own and nothing is
        lost.

        Args:
            path: made if it is missing.
            resume: the files there are this run's, unless they lack a checkpoint to go on from.
            evaluate: nothing is trained: the files there are left alone.
            overwrite: delete an earlier run's files in place of moving them.
        Raises: OSError if the folder cannot be written, or another run is writing to it.
        """
        folder = Path(path)

        def prepare() -> tuple[RunRecord, FileLock]:
            lock = FileLock(folder / LOCK)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except BlockingIOError:
                raise
            except OSError as error:
                raise OSError(
                    f"{folder} cannot be used as the output folder ({error}). Choose another one "
                    "with --output."
                ) from error
            remove_leftovers(folder)
            if not evaluate and not (resume and can_continue(folder)):
                set_aside(folder, overwrite=overwrite)
            record = read_record(folder)
            if record is None:
                now = datetime.datetime.now().isoformat(timespec="seconds")
                record = RunRecord(id=uuid.uuid4().hex, started=now)
                if not evaluate:
                    write_record(folder, record)
            return record, lock

        lock: FileLock | None = None

        def prepared() -> RunRecord:
            nonlocal lock
            record, lock = prepare()
            return record

        return cls(folder, in_first_process(prepared), lock)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def note(self, run: str, *, data_seed: int, data: str, anew: bool) -> None:
        """Record which run this is, and what repeating it needs besides its config.

        Args:
            run: its id.
            data_seed, data: see :class:`RunRecord`.
            anew: it starts at the beginning, so what an earlier start recorded does not count.
        """
        self.record.id = run
        if anew or self.record.data_seed is None:
            self.record.data_seed, self.record.data = data_seed, data
        write_record(self.path, self.record)

    def note_product(self, name: str, iterations: int) -> None:
        """Record that a product of the end was made after so many iterations."""
        self.record.products[name] = iterations
        write_record(self.path, self.record)

    def has_product(self, name: str, iterations: int) -> bool:
        """Return whether a product was made after so many iterations and is still there."""
        made = self.record.products.get(name) == iterations
        return made and (self.path / name).exists()


class FileLock:
    """A lock on a file that ends with the process, however it ends.

    The operating system's record locks are not inherited by child processes: loader workers that
    outlive a killed run for a moment do not hold its lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def acquire(self) -> None:
        """Take the lock, waiting for some seconds.

        Raises: BlockingIOError that names the holder if another process keeps it.
        """
        if fcntl is None:
            return
        # Append: the content is the holder's, until the lock is ours.
        self._file = self.path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    holder = self._holder()
                    self._file.close()
                    raise BlockingIOError(
                        f"Another run is writing to {self.path.parent} ({holder}). Wait for it, "
                        "stop it, or choose another folder with --output."
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                logger.warning(
                    "This file system has no locks (%s): make sure that no second run writes to "
                    "%s.",
                    error.strerror,
                    self.path.parent,
                )
                break
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}\n")
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read().strip() or "unknown process"

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def in_first_process(work: Callable[[], Result]) -> Result:
    """Call a function in the first process; return its result, or raise its error, in all.

    To be called in all processes.
    """
    outcome: tuple[Any, Exception | None, str] = (None, None, "")
    own: Exception | None = None
    if comm.is_main_process():
        try:
            outcome = (work(), None, "")
        except Exception as error:
            own = error
            outcome = (None, sendable(error), traceback.format_exc())
    result, failure, trace = comm.all_gather(outcome)[0]
    if own is not None:
        # A copy that has been sent has lost where it comes from.
        raise own
    if failure is not None:
        raise failure from RemoteTraceback(trace)
    return result


def sendable(error: Exception) -> Exception:
    """Return an error, or one with its message if it cannot be sent to another process."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # takes the way of unpickling
    except Exception:  # whatever its constructor makes of its own arguments
        return RuntimeError(str(error))
    return error


def set_aside(folder: Path, *, overwrite: bool) -> None:
    """Move the files of an earlier run into a folder of their own, or delete them.

    Files of a run that died before it made anything are deleted, its log excepted.
    """
    earlier = list(_owned(folder))
    worth = (path for pattern in WORTH_KEEPING for path in folder.glob(pattern))
    if not any(path.is_symlink() or path.is_dir() or path.stat().st_size for path in worth):
        for path in earlier:
            if path.name == RECORD:
                path.unlink()
        return
    if overwrite:
        for path in earlier:
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink()
        logger.warning("Deleted the files of an earlier run in %s (--overwrite).", folder)
        return
    target = next(_numbered(folder / EARLIER))
    target.mkdir(parents=True)
    # The record goes last: killed in between, the rest is moved at the next start.
    for path in sorted(earlier, key=lambda p: p.name == RECORD):
        path.rename(target / path.name)
    logger.warning(
        "%s held an earlier run: its files are in %s now. To continue a run, add --resume; to "
        "replace one, --overwrite.",
        folder,
        target,
    )


def can_continue(folder: Path) -> bool:
    """Return whether there is a checkpoint to go on from, or nothing that a new start would spoil.

    Whoever deletes the checkpoints of a run and keeps its best model starts anew with ``--resume``.
    """
    models = [path.name for path in folder.glob("model_*.pth")]
    return not models or any(re.fullmatch(r"model_(\d+|final)\.pth", name) for name in models)


def _owned(folder: Path) -> Iterator[Path]:
    for pattern in OWNED:
        yield from folder.glob(pattern)


def _numbered(folder: Path) -> Iterator[Path]:
    number = 1
    while True:
        path = folder / f"{number:03d}"
        if not path.exists():
            yield path
        number += 1


def read_record(folder: Path) -> RunRecord | None:
    """Read ``run.json``; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return RunRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    return None


def write_record(folder: Path, record: RunRecord) -> None:
    """Write ``run.json``."""
    write_text(folder / RECORD, json.dumps(vars(record), indent=1) + "\n")
