"""Report errors to users: one line on the screen, the traceback in the log of the run."""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Warnings of libraries that a user of this package cannot act on.
IGNORED_WARNINGS = (
    ".*torch.jit.script.*",
    ".*torch.meshgrid.*",
    ".*TypedStorage is deprecated.*",
    ".*not writable.*",
    "Grad strides do not match bucket view strides.*",
)

PACKAGE = Path(__file__).parent
# The frames of these files are in every traceback, and never where an error comes from.
WRAPPER_FILES = (Path(__file__), PACKAGE / "supervise.py")


class EnvironmentFault(NamedTuple):
    """A fault of the machine or of another process, and what to do about it.

    Attributes:
        pattern: regular expression that is searched in "type: message".
        message: advice to the user; `{text}` stands for the message of the library.
        is_consequence: a process sees this error because another one has failed.
    """

    pattern: str
    message: str
    is_consequence: bool = False


# The first match wins.
ENVIRONMENT_FAULTS = (
    EnvironmentFault(
        r"[Bb]us error|unable to (mmap|allocate shared memory|write to file </torch_)"
        r"|unable to (open|resize) shared memory|shared memory.*No space left",
        "The shared memory (/dev/shm) is full: enlarge it (docker run --shm-size=8g), or lower "
        "num_workers of the data loaders (dataloader.train.num_workers, DATALOADER.NUM_WORKERS).",
    ),
    EnvironmentFault(
        r"Too many open files|received 0 items of ancdata|Errno 24",
        "Too many files are open: raise the limit (ulimit -n 65536), or lower num_workers of the "
        "data loaders (dataloader.train.num_workers, DATALOADER.NUM_WORKERS).",
    ),
    EnvironmentFault(
        r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)|^lost tensor: ",
        "A data loader process died ({text}). The usual causes are a full memory and too many open "
        "files (ulimit -n): lower num_workers of the data loaders "
        "(dataloader.train.num_workers, DATALOADER.NUM_WORKERS).",
    ),
    EnvironmentFault(
        r"CUDA out of memory|out of memory on device",
        "The GPU is out of memory: lower the batch size (dataloader.train.batch_size, "
        "SOLVER.IMS_PER_BATCH), split the batch (train.accumulation), or recompute activations "
        "(activation_checkpointing of the backbone).",
    ),
    EnvironmentFault(
        r"Cannot allocate memory|can't allocate memory|not enough memory|MemoryError"
        r"|Unable to allocate|can't start new thread|Resource temporarily unavailable",
        "This machine is out of memory, or at its limit of processes ({text}): lower the batch "
        "size, or num_workers of the data loaders.",
    ),
    EnvironmentFault(
        r"No space left on device|Disk quota exceeded|File too large",
        "{text}. Free some disk space; training then continues with --resume.",
    ),
    EnvironmentFault(
        r"EADDRINUSE|[Aa]ddress already in use",
        "The port of --dist-url or MASTER_PORT is already in use: choose another one.",
    ),
    EnvironmentFault(
        r"clients joined|[Tt]imed out.*(rendezvous|waiting for clients)|RendezvousTimeout"
        r"|client socket has timed out",
        "Some machines or processes of this job did not connect in time: check that each machine "
        "has a different --machine-rank, and that all can reach the port of --dist-url.",
    ),
    EnvironmentFault(
        r"[Cc]onnection (closed by peer|reset by peer|refused)|Broken pipe \[|Socket Timeout"
        r"|remote process exited|Connection was likely closed|failed to recv|NCCL (error|timeout)"
        r"|Watchdog caught collective|ncclRemoteError|ncclSystemError|Timed out waiting \d+ms",
        "Another process of this job has ended or cannot be reached; see its message for the "
        "reason. Continue with --resume.",
        is_consequence=True,
    ),
)

# Types that a `raise` statement of this package or of a library uses for bad input.
INPUT_ERRORS = {"ValueError", "KeyError", "TypeError", "OSError"}
# Types that are never a defect, wherever they are raised.
EXPECTED_ERRORS = {"ImportError", "FloatingPointError"}
# Types that are always a defect, even if this package raises them.
INTERNAL_ERRORS = {"AssertionError", "AttributeError", "IndexError"}

# One entry of a printed traceback, with its line of source.
_FRAME = re.compile(r'^ *File "(?P<file>.+)", line (?P<line>\d+), in .*\n(?P<source>.*)', re.M)
_IN_LOADER = re.compile(r"Caught \w+ in .*\.\nOriginal (?P<trace>Traceback .*)", re.DOTALL)


@dataclass(frozen=True)
class Failure:
    """An error, prepared for the user.

    Attributes:
        kind: name of the exception type.
        text: message of the exception, in one line.
        location: file and line that raised it.
        trace: traceback; for an error in a worker process, the tracebacks of both processes.
        is_expected: the cause is bad input or the environment rather than a defect of the program.
        is_consequence: another process failed first.
    """

    kind: str
    text: str
    location: str
    trace: str
    is_expected: bool
    is_consequence: bool = False

    def summary(self, log: Path | None = None) -> str:
        """Return one line; for a defect it names the exception type and the location.

        Args:
            log: file that holds the traceback, None if there is none.
        """
        if self.is_expected:
            return self.text or self.kind
        where = f"the traceback is in {log}" if log else "set FOCALNET_DET_TRACEBACK=1 to see more"
        return (
            f"{self.kind}: {self.text or 'no message'} ({self.location}). "
            f"This is a defect, or input that is not checked; {where}."
        )


class _Origin(NamedTuple):
    """Where an error was created: in this process, or in the worker that sent it.

    Attributes:
        kind: name of the exception type.
        text: message, in one line.
        bases: names of the classes of the exception.
        frames: (file, line) of the traceback, outermost first.
        is_raised: a `raise` statement created it, rather than an operation in C.
    """

    kind: str
    text: str
    bases: set[str]
    frames: list[tuple[str, int]]
    is_raised: bool

    @property
    def is_ours(self) -> bool:
        """Tell whether the innermost frame is in this package."""
        return _is_ours(self.frames[-1][0])


def read_failure(error: BaseException) -> Failure:
    """Classify an error as bad input, a fault of the environment, or a defect.

    Expected errors are those that a `raise` statement created (of the types that stand for bad
    input, or of any type in this package), operating system errors, and the rows of
    `ENVIRONMENT_FAULTS`. An error of a loader process or of a pool is classified as if it had
    happened in this process.
    """
    trace = "".join(traceback.format_exception(error))
    origin = _find_origin(error)
    fault = _find_fault(error, origin)
    if fault is not None:
        message = fault.message.replace("{text}", origin.text.rstrip(".") or origin.kind)
        return Failure(origin.kind, message, "", trace, True, fault.is_consequence)
    file, line = next(
        (f for f in reversed(origin.frames) if _is_ours(f[0]) and Path(f[0]) not in WRAPPER_FILES),
        (origin.frames or [("?", 0)])[-1],
    )
    return Failure(origin.kind, origin.text, f"{_short(file)}:{line}", trace, _is_expected(origin))


def _find_origin(error: BaseException) -> _Origin:
    bases = {kind.__name__ for kind in type(error).__mro__}
    # str() of a KeyError is quoted.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    there = _IN_LOADER.match(text)
    # What process pools attach to the errors of their workers.
    remote = there["trace"] if there else getattr(error.__cause__, "tb", None)
    if isinstance(remote, str):
        kind, message, frames, is_raised = _parse_trace(remote)
        text = message if there else text
        bases = {kind.rpartition(".")[2]} | (bases - {"RuntimeError"})
    else:
        kind = type(error).__name__
        frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
        is_raised = _is_raised(error)
    return _Origin(kind, " ".join(text.split()), bases, frames, is_raised)


def _find_fault(error: BaseException, origin: _Origin) -> EnvironmentFault | None:
    """Return the row of `ENVIRONMENT_FAULTS` that an error matches, None without one."""
    if origin.is_raised and origin.frames and origin.is_ours:
        return None  # messages of this package already say what to do
    # A tensor is fetched from the loader process that sent it, which may be dead by then.
    is_lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and any(
        file.endswith(("multiprocessing/reductions.py", "resource_sharer.py"))
        for file, _ in origin.frames
    )
    subject = f"{'lost tensor' if is_lost else origin.kind}: {origin.text}"
    return next((row for row in ENVIRONMENT_FAULTS if re.search(row.pattern, subject)), None)


def _is_expected(origin: _Origin) -> bool:
    bases, is_raised = origin.bases, origin.is_raised
    return (
        bool(bases & EXPECTED_ERRORS)
        or ("OSError" in bases and (is_raised or origin.text.startswith("[Errno")))
        or (
            is_raised
            and not bases & INTERNAL_ERRORS
            and (bool(bases & INPUT_ERRORS) or origin.is_ours)
        )
    )


def _is_raised(error: BaseException) -> bool:
    """Tell whether a `raise` statement created the error, rather than an operation in C."""
    import dis

    tail = error.__traceback__
    if tail is None:
        return True
    while tail.tb_next is not None:
        tail = tail.tb_next
    return tail.tb_frame.f_code.co_code[tail.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _parse_trace(trace: str) -> tuple[str, str, list[tuple[str, int]], bool]:
    """Parse a printed traceback: type, message, (file, line) of the frames, `is_raised`."""
    found = list(_FRAME.finditer(trace))
    if not found:
        kind, _, text = trace.strip().rpartition("\n")[2].partition(": ")
        return kind, text, [("?", 0)], True
    # The last line of source is followed by indented markers, then by the message.
    rest = trace[found[-1].end() :].lstrip("\n").split("\n")
    while len(rest) > 1 and (not rest[0] or rest[0].startswith(" ")):
        rest.pop(0)
    kind, _, text = "\n".join(rest).partition(": ")
    if kind.strip() == "KeyError" and text[:1] in "'\"":
        text = text.strip()[1:-1]
    is_raised = re.match(r"\s*(.*: )?raise\b", found[-1]["source"]) is not None
    return kind.strip(), text, [(f["file"], int(f["line"])) for f in found], is_raised


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(PACKAGE)


def _short(file: str) -> str:
    """Return the path relative to the folder of the package, or the path itself outside it."""
    return str(Path(file).relative_to(PACKAGE.parent)) if _is_ours(file) else file


def log_failure(failure: Failure) -> Path | None:
    """Write the traceback to the log files of the run, but not to the screen.

    Returns: the first of these files; None if the run has none yet.
    """
    logger = logging.getLogger("focalnet_det")
    files = [h for h in logger.handlers if isinstance(h, logging.FileHandler)]
    for handler in files:
        message = f"The run failed.\n{failure.trace}"
        handler.handle(
            logging.LogRecord(logger.name, logging.ERROR, __file__, 0, message, None, None)
        )
    return Path(files[0].baseFilename) if files else None


def silence_libraries() -> None:
    """Silence the warnings in `IGNORED_WARNINGS` in this process."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("torch.utils.cpp_extension", "detectron2.data.datasets.coco"):
        logging.getLogger(name).setLevel(logging.ERROR)


def traceback_requested() -> bool:
    """Tell whether `FOCALNET_DET_TRACEBACK` asks for tracebacks on the screen."""
    return bool(os.getenv("FOCALNET_DET_TRACEBACK"))


@contextlib.contextmanager
def ignore_worker_exits() -> Iterator[None]:
    """Ignore loader processes that die within the block; PyTorch raises an error at SIGCHLD."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors as one line on stderr and exit with status 1; silence known warnings.

    The traceback goes to the log of the run, if there is one. `FOCALNET_DET_TRACEBACK=1` prints it
    instead.

    Raises: SystemExit for any error within the block.
    """
    silence_libraries()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        with ignore_worker_exits():
            failure = read_failure(error)
            log = log_failure(failure)
        if traceback_requested():
            raise
        print(f"error: {failure.summary(log)}", file=sys.stderr)
        sys.exit(1)
