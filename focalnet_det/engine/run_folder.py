"""Manage the output folder of a run: lock it, and keep the files of different runs apart."""

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
# Files that a run writes; others in the folder belong to the user and are left alone.
RUN_FILES = (
    *(RECORD, METRICS, LAST, "model_*.pth", "model_*.pth.broken", "trouble_*.pth"),
    *(CONFIG, "environment.txt", "log.txt", "log.txt.rank*", "events.out.tfevents.*"),
    *("curves.png", "predictions.png", "train_samples.png", "profile*.json", "profile*.txt"),
    *(EVALUATION, "wandb"),
)
# Files that are expensive to recreate.
WORTH_KEEPING = ("model_*.pth", METRICS, EVALUATION)
# Seconds to wait for the lock of a run that is about to end.
LOCK_TIMEOUT = 10.0

Result = TypeVar("Result")


@dataclass
class RunRecord:
    """Contents of ``run.json``.

    Attributes:
        id: of this run, also stored in its checkpoints.
        started: local time, ISO 8601.
        products: final outputs, name -> completed iterations when it was created.
        data_seed: seed of the order and augmentation of the images.
        data: fingerprint of the training data.
    """

    id: str
    started: str
    products: dict[str, int] = field(default_factory=dict)
    data_seed: int | None = None
    data: str = ""


class RunFolder:
    """Output folder of a run, locked for its duration.

    Use it as a context manager in all processes; only the main process accesses the disk.

    Attributes:
        path: the folder.
        record: contents of ``run.json``.
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
        """Lock a folder and prepare it for a run. Collective: call it in all processes.

        A new run in the folder of another one moves the earlier files to ``earlier_runs/001`` and
        so on, so that they are neither confused with its own nor lost.

        Args:
            path: created if it does not exist.
            resume: the files belong to this run, unless there is no checkpoint to resume from.
            evaluate: nothing is trained, so existing files are left alone.
            overwrite: delete the files of an earlier run instead of moving them.
        Raises: OSError if the folder cannot be written, or another run is writing to it.
        """
        folder = Path(path)
        lock: FileLock | None = None

        def prepare() -> RunRecord:
            nonlocal lock
            # Local to this process: the lock cannot be sent to others like the record.
            lock = _lock_folder(folder)
            remove_leftovers(folder)
            if not evaluate and not (resume and can_continue(folder)):
                set_aside(folder, overwrite=overwrite)
            return read_record(folder) or _new_record(folder, write=not evaluate)

        return cls(folder, in_first_process(prepare), lock)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def note(self, run: str, *, data_seed: int, data: str, anew: bool) -> None:
        """Record id and data of the run in ``run.json``.

        Args:
            run: its id.
            data_seed, data: see :class:`RunRecord`.
            anew: replace the values of an earlier start, since training begins at iteration 0.
        """
        self.record.id = run
        if anew or self.record.data_seed is None:
            self.record.data_seed, self.record.data = data_seed, data
        write_record(self.path, self.record)

    def note_product(self, name: str, iterations: int) -> None:
        """Record that a final output was created after a number of iterations."""
        self.record.products[name] = iterations
        write_record(self.path, self.record)

    def has_product(self, name: str, iterations: int) -> bool:
        """Return whether an output was created after this number of iterations and still exists."""
        made = self.record.products.get(name) == iterations
        return made and (self.path / name).exists()


def _lock_folder(folder: Path) -> "FileLock":
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"{folder} cannot be used as the output folder ({error}). Choose another one with "
            "--output."
        ) from error
    return lock


def _new_record(folder: Path, *, write: bool) -> RunRecord:
    now = datetime.datetime.now().isoformat(timespec="seconds")
    record = RunRecord(id=uuid.uuid4().hex, started=now)
    if write:
        write_record(folder, record)
    return record


class FileLock:
    """File lock that is released when the process ends, even if it is killed.

    POSIX record locks are not inherited by child processes, so loader workers that briefly outlive
    a killed run do not hold the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def acquire(self) -> None:
        """Acquire the lock, waiting for up to ``LOCK_TIMEOUT`` seconds.

        Raises: BlockingIOError with the holder if another process holds it.
        """
        if fcntl is None:
            return
        # Append mode preserves the description of the holder until the lock is acquired.
        self._file = self.path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + LOCK_TIMEOUT
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
                    "This file system does not support locks (%s). Make sure that no other run "
                    "writes to %s.",
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
        """Release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None


def in_first_process(work: Callable[[], Result]) -> Result:
    """Call a function in the main process, and return its result, or raise its error, in all.

    Collective: call it in all processes.
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
        # The original error, because the gathered copy has no traceback.
        raise own
    if failure is not None:
        raise failure from RemoteTraceback(trace)
    return result


def sendable(error: Exception) -> Exception:
    """Return an error that can be pickled: the same one, or one with its message."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # calls the constructor like unpickling
    except Exception:  # constructors may raise anything
        return RuntimeError(str(error))
    return error


def set_aside(folder: Path, *, overwrite: bool) -> None:
    """Move the files of an earlier run into a subfolder, or delete them.

    Of a run that failed before it produced results, only ``run.json`` is deleted.
    """
    earlier = list(_run_files(folder))
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
        logger.warning("Deleted the files of the earlier run in %s (--overwrite).", folder)
        return
    target = next(_numbered(folder / EARLIER))
    target.mkdir(parents=True)
    # The record is moved last, so that after an interruption the next start moves the rest.
    for path in sorted(earlier, key=lambda p: p.name == RECORD):
        path.rename(target / path.name)
    logger.warning(
        "%s contained an earlier run, whose files were moved to %s. Use --resume to continue a "
        "run, or --overwrite to replace it.",
        folder,
        target,
    )


def can_continue(folder: Path) -> bool:
    """Return whether there is a checkpoint to resume from, or no model at all.

    If only the best model remains of a run, ``--resume`` starts a new run.
    """
    models = [path.name for path in folder.glob("model_*.pth")]
    return not models or any(re.fullmatch(r"model_(\d+|final)\.pth", name) for name in models)


def _run_files(folder: Path) -> Iterator[Path]:
    for pattern in RUN_FILES:
        yield from folder.glob(pattern)


def _numbered(folder: Path) -> Iterator[Path]:
    number = 1
    while True:
        path = folder / f"{number:03d}"
        if not path.exists():
            yield path
        number += 1


def read_record(folder: Path) -> RunRecord | None:
    """Read ``run.json``; None if it does not exist or cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return RunRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    return None


def write_record(folder: Path, record: RunRecord) -> None:
    """Write ``run.json``."""
    write_text(folder / RECORD, json.dumps(vars(record), indent=1) + "\n")
