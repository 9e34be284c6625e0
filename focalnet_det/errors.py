"""How errors reach people: one line on the screen, the traceback in the log of the run."""

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

# Remarks of libraries about themselves that no user of ours can act on.
NOISE = (
    ".*torch.jit.script.*",
    ".*torch.meshgrid.*",
    ".*TypedStorage is deprecated.*",
    ".*not writable.*",
    "Grad strides do not match bucket view strides.*",
)

PACKAGE = Path(__file__).parent
# Every error passes through these.
PASSED_BY_ALL = (Path(__file__), PACKAGE / "supervise.py")


class Surrounding(NamedTuple):
    """A fault of the machine or of other processes, and what to do about it.

    `sentence` may hold `{text}`, the message of the library. `is_consequence` marks what a process
    sees when another one has failed.
    """

    pattern: str
    sentence: str
    is_consequence: bool = False


# Searched in "type: message", in this order.
SURROUNDINGS = (
    Surrounding(
        r"[Bb]us error|unable to (mmap|allocate shared memory|write to file </torch_)"
        r"|unable to (open|resize) shared memory|shared memory.*No space left",
        "The shared memory (/dev/shm) is full: enlarge it (docker run --shm-size=8g), or lower "
        "num_workers of the data loaders (dataloader.train.num_workers, DATALOADER.NUM_WORKERS).",
    ),
    Surrounding(
        r"Too many open files|received 0 items of ancdata|Errno 24",
        "Too many files are open: raise the limit (ulimit -n 65536), or lower num_workers of the "
        "data loaders (dataloader.train.num_workers, DATALOADER.NUM_WORKERS).",
    ),
    Surrounding(
        r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)|^lost tensor: ",
        "A data loader process died ({text}). Most often the memory was full, or too many files "
        "were open (ulimit -n): lower num_workers of the data loaders "
        "(dataloader.train.num_workers, DATALOADER.NUM_WORKERS).",
    ),
    Surrounding(
        r"CUDA out of memory|out of memory on device",
        "The GPU's memory is full: lower the batch (dataloader.train.batch_size, "
        "SOLVER.IMS_PER_BATCH), split it (train.accumulation), or recompute activations "
        "(activation_checkpointing of the backbone).",
    ),
    Surrounding(
        r"Cannot allocate memory|can't allocate memory|not enough memory|MemoryError"
        r"|Unable to allocate|can't start new thread|Resource temporarily unavailable",
        "The memory of this machine, or its limit on processes, is used up ({text}): lower the "
        "batch, or num_workers of the data loaders.",
    ),
    Surrounding(
        r"No space left on device|Disk quota exceeded|File too large",
        "{text}. Free some space; a training then continues with --resume.",
    ),
    Surrounding(
        r"EADDRINUSE|[Aa]ddress already in use",
        "The port of --dist-url or MASTER_PORT is in use: choose another one.",
    ),
    Surrounding(
        r"clients joined|[Tt]imed out.*(rendezvous|waiting for clients)|RendezvousTimeout"
        r"|client socket has timed out",
        "Not all machines or processes of this job came together in time: check that each runs "
        "with its own --machine-rank, and that all reach the port of --dist-url.",
    ),
    Surrounding(
        r"[Cc]onnection (closed by peer|reset by peer|refused)|Broken pipe \[|Socket Timeout"
        r"|remote process exited|Connection was likely closed|failed to recv|NCCL (error|timeout)"
        r"|Watchdog caught collective|ncclRemoteError|ncclSystemError|Timed out waiting \d+ms",
        "Another process of this job has ended or cannot be reached; its own message says why. "
        "Continue with --resume.",
        is_consequence=True,
    ),
)

# What the package and the libraries raise on bad input, where a `raise` statement does it.
INPUT = {"ValueError", "KeyError", "TypeError", "OSError"}
# Expected from whatever raises them.
EXPECTED = {"ImportError", "FloatingPointError"}
# Never meant for users, even if our own code raises them.
INTERNAL = {"AssertionError", "AttributeError", "IndexError"}

# One entry of a printed traceback, with its line of source.
_FRAME = re.compile(r'^ *File "(?P<file>.+)", line (?P<line>\d+), in .*\n(?P<source>.*)', re.M)
_IN_LOADER = re.compile(r"Caught \w+ in .*\.\nOriginal (?P<trace>Traceback .*)", re.DOTALL)


@dataclass(frozen=True)
class Failure:
    """An error, as people are to read it.

    Attributes:
        kind: name of its type.
        text: its message, in one line.
        place: file and line that it comes from.
        trace: the traceback; for an error in another process, that of both.
        is_deliberate: bad input or surroundings, in contrast to a defect of the program.
        is_consequence: another process failed first.
    """

    kind: str
    text: str
    place: str
    trace: str
    is_deliberate: bool
    is_consequence: bool = False

    def sentence(self, log: Path | None = None) -> str:
        """Return one line; for a defect it names the type, the place and the traceback's home."""
        if self.is_deliberate:
            return self.text or self.kind
        where = f"the traceback is in {log}" if log else "FOCALNET_DET_TRACEBACK=1 shows more"
        return (
            f"{self.kind}: {self.text or 'no message'} ({self.place}). "
            f"This is a defect, or input that is not checked; {where}."
        )


def read_failure(error: BaseException) -> Failure:
    """Tell bad input and bad surroundings from defects.

    Deliberate are errors that a `raise` statement made, of the types that stand for bad input or of
    any type in our package, operating system errors, and the rows of `SURROUNDINGS`. An error of a
    loader process or of a pool counts as it did there.
    """
    trace = "".join(traceback.format_exception(error))
    names = {kind.__name__ for kind in type(error).__mro__}
    # str() of a KeyError is quoted.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    there = _IN_LOADER.match(text)
    # What process pools attach to the errors of their workers.
    remote = there["trace"] if there else getattr(error.__cause__, "tb", None)
    if isinstance(remote, str):
        kind, said, frames, is_raised = _parse_trace(remote)
        text = said if there else text
        names = {kind.rpartition(".")[2]} | (names - {"RuntimeError"})
    else:
        kind = type(error).__name__
        frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
        is_raised = _is_raised(error)
    text = " ".join(text.split())
    # A tensor is fetched from the loader process that sent it, which may be dead by then.
    is_lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and any(
        file.endswith(("multiprocessing/reductions.py", "resource_sharer.py")) for file, _ in frames
    )
    subject = f"{'lost tensor' if is_lost else kind}: {text}"
    # Our own sentences say themselves what to do.
    is_said = is_raised and bool(frames) and _is_ours(frames[-1][0])
    for row in () if is_said else SURROUNDINGS:
        if re.search(row.pattern, subject):
            said = row.sentence.replace("{text}", text.rstrip(".") or kind)
            return Failure(kind, said, "", trace, True, row.is_consequence)
    file, line = next(
        (f for f in reversed(frames) if _is_ours(f[0]) and Path(f[0]) not in PASSED_BY_ALL),
        (frames or [("?", 0)])[-1],
    )
    is_deliberate = (
        bool(names & EXPECTED)
        or ("OSError" in names and (is_raised or text.startswith("[Errno")))
        or (is_raised and not names & INTERNAL and (bool(names & INPUT) or _is_ours(frames[-1][0])))
    )
    return Failure(kind, text, f"{_short(file)}:{line}", trace, is_deliberate)


def _is_raised(error: BaseException) -> bool:
    """Whether a `raise` statement of Python code made the error, and not an operation in C."""
    import dis

    tail = error.__traceback__
    if tail is None:
        return True
    while tail.tb_next is not None:
        tail = tail.tb_next
    return tail.tb_frame.f_code.co_code[tail.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _parse_trace(trace: str) -> tuple[str, str, list[tuple[str, int]], bool]:
    """Return type, message, frames as (file, line) and whether a `raise` statement made it."""
    found = list(_FRAME.finditer(trace))
    if not found:
        kind, _, text = trace.strip().rpartition("\n")[2].partition(": ")
        return kind, text, [("?", 0)], True
    # Below the last line of source stand markers, indented, and then the message.
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
    """Return the path from the package's folder on, or the whole of it."""
    return str(Path(file).relative_to(PACKAGE.parent)) if _is_ours(file) else file


def log_failure(failure: Failure) -> Path | None:
    """Write the traceback into the log files of the run, but not on the screen.

    Returns: the first of these files; None before a run has one.
    """
    logger = logging.getLogger("focalnet_det")
    files = [h for h in logger.handlers if isinstance(h, logging.FileHandler)]
    for handler in files:
        message = f"The run ends with an error.\n{failure.trace}"
        handler.handle(
            logging.LogRecord(logger.name, logging.ERROR, __file__, 0, message, None, None)
        )
    return Path(files[0].baseFilename) if files else None


def quiet_libraries() -> None:
    """Hide the remarks in `NOISE` from this process."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("torch.utils.cpp_extension", "detectron2.data.datasets.coco"):
        logging.getLogger(name).setLevel(logging.ERROR)


def wants_traceback() -> bool:
    """Whether `FOCALNET_DET_TRACEBACK` asks for tracebacks on the screen."""
    return bool(os.getenv("FOCALNET_DET_TRACEBACK"))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep loader processes that die meanwhile from raising errors; PyTorch does at SIGCHLD."""
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
    """Turn errors into one line on stderr and exit status 1; silence known noise.

    The traceback goes into the log of the run, if there is one. `FOCALNET_DET_TRACEBACK=1` shows it
    instead.
    """
    quiet_libraries()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        with undisturbed():
            failure = read_failure(error)
            log = log_failure(failure)
        if wants_traceback():
            raise
        print(f"error: {failure.sentence(log)}", file=sys.stderr)
        sys.exit(1)
