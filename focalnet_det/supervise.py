"""Start worker processes, forward signals to them, and end all of them when one fails."""

import contextlib
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from torch import distributed
from torch.multiprocessing.spawn import start_processes

from .errors import (
    ignore_worker_exits,
    log_failure,
    read_failure,
    silence_libraries,
    traceback_requested,
)

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Exit codes of a training that saved and stopped because a signal asked for it, and of Ctrl-C.
EXIT_STOPPED, EXIT_INTERRUPTED = 75, 130

# Seconds that processes have to report after one has failed, to end after SIGTERM, to end after a
# second signal, and to exit after the last report.
REPORT_SECONDS, TERMINATE_SECONDS, SECOND_SIGNAL_SECONDS, EXIT_SECONDS = 3.0, 15.0, 10.0, 60.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended, as it reported itself.

    Attributes:
        code: exit code.
        time: time of the report, seconds since 1970.
        message: what went wrong; empty if nothing did.
        is_consequence: another process failed first.
        exited_silently: the process ended without a report; its parent wrote the message.
    """

    code: int
    time: float
    message: str = ""
    is_consequence: bool = False
    exited_silently: bool = False


class Job:
    """The worker processes of this machine.

    Args:
        processes: started processes.
        receivers: for each process, the connection that delivers its outcome.
    """

    def __init__(self, processes: list[Any], receivers: list[Connection]) -> None:
        self.processes = processes
        self.receivers = receivers
        self.outcomes: dict[int, Outcome] = {}
        self.signals: list[int] = []
        self.deadline: float | None = None

    def forward(self, number: int, _frame: FrameType | None = None) -> None:
        """Forward a signal to every process; a second one sets a deadline to end."""
        if not self.signals:
            announce(number)
        self.signals.append(number)
        if len(self.signals) > 1:
            self.deadline = time.monotonic() + SECOND_SIGNAL_SECONDS
        self.send(number)

    def send(self, number: int) -> None:
        """Send a signal to the processes that are alive."""
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def watch(self, seconds: float | None) -> None:
        """Wait until a process reports or ends, and record outcomes; None for no time limit."""
        alive = [i for i in range(len(self.processes)) if i not in self.outcomes]
        sources = [self.processes[i].sentinel for i in alive] + [self.receivers[i] for i in alive]
        multiprocessing.connection.wait(sources, seconds)
        for i in alive:
            outcome = self.poll_outcome(i)
            if outcome is not None:
                self.outcomes[i] = outcome

    def poll_outcome(self, index: int) -> Outcome | None:
        """Return what a process reported, or how it died; None while it runs."""
        # Read before the report: a process reports before it ends, so none can be missed.
        has_ended = not self.processes[index].is_alive()
        with contextlib.suppress(EOFError):
            if self.receivers[index].poll():
                reported: Outcome = self.receivers[index].recv()
                return reported
        return self.exit_outcome(index) if has_ended else None

    def exit_outcome(self, index: int) -> Outcome:
        """Return the outcome of a process that ended without a report."""
        code: int = self.processes[index].exitcode
        now = time.time()
        if -code in self.signals:
            # Its signal handlers were not installed yet: no work is lost.
            return Outcome(EXIT_INTERRUPTED if -code == signal.SIGINT else EXIT_STOPPED, now)
        if self.signals and code in (EXIT_STOPPED, EXIT_INTERRUPTED):
            return Outcome(code, now)
        if code >= 0:
            message = f"ended with exit code {code} without a message"
            return Outcome(code or 1, now, message, exited_silently=True)
        hints: dict[int, str] = {
            signal.SIGKILL: ": out of memory?",
            signal.SIGSEGV: ", a crash in native code",
        }
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Outcome(
            128 - code, now, f"was killed by {name}{hints.get(-code, '')}", exited_silently=True
        )

    @property
    def failures(self) -> dict[int, Outcome]:
        """Return the outcomes that end the job, by process index."""
        return {i: outcome for i, outcome in self.outcomes.items() if outcome.message}

    @property
    def is_done(self) -> bool:
        """Tell whether every process has ended."""
        return len(self.outcomes) == len(self.processes)

    def wait(self) -> None:
        """Wait until all processes have ended; if one fails, end the others."""
        while not self.is_done and not self.failures:
            left = None if self.deadline is None else self.deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            # Finite waits, because Python runs signal handlers between them only.
            self.watch(min(left or 60.0, 60.0))
        if self.failures:
            self.collect_reports(REPORT_SECONDS)
        self.end()

    def collect_reports(self, seconds: float) -> None:
        """Give the remaining processes time to report what happened to them."""
        until = time.monotonic() + seconds
        while not self.is_done and time.monotonic() < until:
            self.watch(until - time.monotonic())

    def end(self) -> None:
        """End the processes that are left; some may hang in a collective operation."""
        is_finished = self.is_done and not self.failures
        if not is_finished:
            self.send(signal.SIGTERM)
        until = time.monotonic() + (EXIT_SECONDS if is_finished else TERMINATE_SECONDS)
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
            # Data loader workers of a killed process would otherwise survive for some seconds.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def verdict(self, ranks: Sequence[int], world_size: int) -> tuple[int, str]:
        """Return the exit code of the job and a message on why it failed, "" if it did not.

        The message is that of the earliest failure that is not a consequence of another one.

        Args:
            ranks: rank in the whole job of each process of this machine.
            world_size: number of processes of the whole job.
        """
        failures = self.failures
        if not failures:
            codes = {outcome.code for outcome in self.outcomes.values()}
            stopped = EXIT_INTERRUPTED if signal.SIGINT in self.signals else EXIT_STOPPED
            return max(codes) if self.is_done else stopped, ""
        stopped_by_signal = {o.code for o in self.outcomes.values() if not o.message} - {0}
        if self.signals and stopped_by_signal and all(f.is_consequence for f in failures.values()):
            # The others waited for a process that had already saved and ended.
            return max(stopped_by_signal), ""
        index = min(failures, key=lambda i: (failures[i].is_consequence, failures[i].time))
        first = failures[index]
        if not first.exited_silently and all(
            i in failures and failures[i].message == first.message
            for i in range(len(self.processes))
        ):
            return first.code, first.message
        who = f"process {ranks[index]} of {world_size}{'' if first.exited_silently else ':'}"
        end = "" if first.message.endswith((".", "?")) else "."
        advice = "" if "--resume" in first.message else "; continue a training with --resume"
        return first.code, f"{who} {first.message}{end} The job has ended{advice}."


def announce(number: int) -> None:
    """Print what a first signal does to stderr; safe to call from a signal handler."""
    name = signal.Signals(number).name
    text = f"\n{name}: stopping as soon as the state is saved. A second signal stops at once.\n"
    # print() is not reentrant.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def run_processes(
    function: Callable[[int, Any], None],
    argument: Any,
    count: int,
    *,
    first_rank: int = 0,
    world_size: int | None = None,
) -> None:
    """Run `function(index, argument)` in several processes, and wait for them.

    SIGINT, SIGTERM and SIGUSR1 are forwarded to them. When one fails, the others are ended within a
    minute, and one line on stderr gives the reason.

    Args:
        function: called in each process with its index and `argument`.
        argument: must be picklable.
        count: number of processes.
        first_rank, world_size: position of these processes in the whole job, for messages.
    Raises: SystemExit with the exit code of the processes, unless all succeeded.
    """
    # Created here it is inherited, and removed even if a process is killed.
    multiprocessing.util.get_temp_dir()
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(count)]
    with blocked_signals():
        context = start_processes(
            run_worker,
            (function, argument, [sender for _, sender in pipes]),
            nprocs=count,
            join=False,
        )
        job = Job(context.processes, [receiver for receiver, _ in pipes])
        with handled_signals(STOPPING, job.forward), unblocked_signals():
            job.wait()
    ranks = range(first_rank, first_rank + count)
    code, message = job.verdict(ranks, world_size or count)
    if message:
        print(f"error: {message}", file=sys.stderr)
    if code:
        sys.exit(code)


def run_worker(
    index: int, function: Callable[[int, Any], None], argument: Any, senders: list[Connection]
) -> None:
    """Run a function as one of several processes, and report its outcome to the parent.

    Raises: SystemExit always.
    """
    # Ctrl-C in a terminal reaches its whole process group; workers get it from the parent alone.
    os.setsid()
    silence_libraries()
    outcome = Outcome(EXIT_INTERRUPTED, time.time())
    try:
        with exit_on_early_signal(), unblocked_signals():
            function(index, argument)
        outcome = Outcome(0, time.time())
    except SystemExit as end:
        outcome = Outcome(end.code if isinstance(end.code, int) else 1, time.time())
        if outcome.code not in (0, EXIT_STOPPED, EXIT_INTERRUPTED):
            outcome = Outcome(outcome.code, time.time(), f"ended with exit code {outcome.code}")
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        with ignore_worker_exits():
            failure = read_failure(error)
            message = failure.summary(log_failure(failure))
        outcome = Outcome(1, time.time(), message, failure.is_consequence)
        if traceback_requested():
            traceback.print_exc()
    # Sent before the process group is destroyed, which may take long if others hang.
    senders[index].send(outcome)
    if distributed.is_initialized():
        # Threads of gloo that still run would abort the process at its exit.
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()
    sys.exit(outcome.code)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Block the signals that stop a job, here and in processes started within the block.

    A signal that arrives while a process imports its modules then waits until it can be handled.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def unblocked_signals() -> Iterator[None]:
    """Undo `blocked_signals` within a block, also where the parent process blocked them."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handled_signals(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Install a signal handler within a block; ignored signals stay ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number, earlier in before.items() if earlier != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def exit_on_early_signal() -> contextlib.AbstractContextManager[None]:
    """Exit at SIGTERM and SIGUSR1 before training begins, which installs its own handlers."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(EXIT_STOPPED)

    return handled_signals((signal.SIGTERM, signal.SIGUSR1), stop)
