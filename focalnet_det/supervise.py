"""Start processes, pass signals on to them, and end all of them when one fails."""

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

from .errors import log_failure, quiet_libraries, read_failure, undisturbed, wants_traceback

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Exit codes of a training that saved and stopped because a signal asked for it, and of Ctrl-C.
EXIT_STOPPED, EXIT_INTERRUPTED = 75, 130

# Seconds: for other processes to say why they fail too, to end after SIGTERM, to end after a second
# signal, and to exit after the last word.
HEAR, TERMINATE, LEAVE, EXIT = 3.0, 15.0, 10.0, 60.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended, in its own words.

    Attributes:
        code: its exit code.
        time: when it knew, seconds since 1970.
        sentence: what went wrong; empty if nothing did.
        is_consequence: another process failed first.
        is_death: it ended without a word, and the sentence is the verdict of its parent.
    """

    code: int
    time: float
    sentence: str = ""
    is_consequence: bool = False
    is_death: bool = False


class Job:
    """The processes of this machine.

    Args:
        processes: that were started.
        receivers: of the outcome of each.
    """

    def __init__(self, processes: list[Any], receivers: list[Connection]) -> None:
        self.processes = processes
        self.receivers = receivers
        self.outcomes: dict[int, Outcome] = {}
        self.signals: list[int] = []
        self.deadline: float | None = None

    def forward(self, number: int, _frame: FrameType | None = None) -> None:
        """Pass a signal on to every process; after a second one they have to leave soon."""
        if not self.signals:
            announce(number)
        self.signals.append(number)
        if len(self.signals) > 1:
            self.deadline = time.monotonic() + LEAVE
        self.send(number)

    def send(self, number: int) -> None:
        """Send a signal to the processes that are alive."""
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def watch(self, seconds: float | None) -> None:
        """Wait until a process says or does something, and note outcomes; None for no limit."""
        alive = [i for i in range(len(self.processes)) if i not in self.outcomes]
        sources = [self.processes[i].sentinel for i in alive] + [self.receivers[i] for i in alive]
        multiprocessing.connection.wait(sources, seconds)
        for i in alive:
            outcome = self.outcome_of(i)
            if outcome is not None:
                self.outcomes[i] = outcome

    def outcome_of(self, index: int) -> Outcome | None:
        """Return what a process said, or how it died; None while it works."""
        # Asked first: what a process says, it says before it ends.
        has_ended = not self.processes[index].is_alive()
        with contextlib.suppress(EOFError):
            if self.receivers[index].poll():
                said: Outcome = self.receivers[index].recv()
                return said
        return self.death_of(index) if has_ended else None

    def death_of(self, index: int) -> Outcome:
        """Return the outcome of a process that ended without a word."""
        code: int = self.processes[index].exitcode
        now = time.time()
        if -code in self.signals:
            # It had not begun: nothing is lost.
            return Outcome(EXIT_INTERRUPTED if -code == signal.SIGINT else EXIT_STOPPED, now)
        if self.signals and code in (EXIT_STOPPED, EXIT_INTERRUPTED):
            return Outcome(code, now)
        if code >= 0:
            said = f"ended with exit code {code} without a message"
            return Outcome(code or 1, now, said, is_death=True)
        hints: dict[int, str] = {
            signal.SIGKILL: ": out of memory?",
            signal.SIGSEGV: ", a crash in native code",
        }
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Outcome(
            128 - code, now, f"was killed by {name}{hints.get(-code, '')}", is_death=True
        )

    @property
    def failures(self) -> dict[int, Outcome]:
        """Outcomes that end the job."""
        return {i: outcome for i, outcome in self.outcomes.items() if outcome.sentence}

    @property
    def is_done(self) -> bool:
        return len(self.outcomes) == len(self.processes)

    def wait(self) -> None:
        """Wait until all processes have ended, or one has failed and the others are gone too."""
        while not self.is_done and not self.failures:
            left = None if self.deadline is None else self.deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            # Python runs the handlers of signals between two waits.
            self.watch(min(left or 60.0, 60.0))
        if self.failures:
            self.listen(HEAR)
        self.end()

    def listen(self, seconds: float) -> None:
        """Give the processes time to say what happened to them."""
        until = time.monotonic() + seconds
        while not self.is_done and time.monotonic() < until:
            self.watch(until - time.monotonic())

    def end(self) -> None:
        """Make sure that no process is left: most have ended, others may hang in a collective."""
        is_finished = self.is_done and not self.failures
        if not is_finished:
            self.send(signal.SIGTERM)
        until = time.monotonic() + (EXIT if is_finished else TERMINATE)
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
            # Loader processes of one that was killed would live on for some seconds.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def verdict(self, ranks: Sequence[int], world_size: int) -> tuple[int, str]:
        """Return the exit code of the job, and one sentence on why it failed, if it did.

        The earliest failure counts that is not the consequence of another one.

        Args:
            ranks: of the processes in the whole job, of `world_size`.
        """
        failures = self.failures
        if not failures:
            codes = {outcome.code for outcome in self.outcomes.values()}
            stopped = EXIT_INTERRUPTED if signal.SIGINT in self.signals else EXIT_STOPPED
            return max(codes) if self.is_done else stopped, ""
        stopped_by_signal = {o.code for o in self.outcomes.values() if not o.sentence} - {0}
        if self.signals and stopped_by_signal and all(f.is_consequence for f in failures.values()):
            # The others waited for a process that had saved and left already.
            return max(stopped_by_signal), ""
        index = min(failures, key=lambda i: (failures[i].is_consequence, failures[i].time))
        first = failures[index]
        if not first.is_death and all(
            i in failures and failures[i].sentence == first.sentence
            for i in range(len(self.processes))
        ):
            return first.code, first.sentence
        who = f"process {ranks[index]} of {world_size}{'' if first.is_death else ':'}"
        end = "" if first.sentence.endswith((".", "?")) else "."
        advice = "" if "--resume" in first.sentence else "; a training continues with --resume"
        return first.code, f"{who} {first.sentence}{end} The job has ended{advice}."


def announce(number: int) -> None:
    """Say on standard error what a first signal does; may be called in a handler of signals."""
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

    SIGINT, SIGTERM and SIGUSR1 are passed on to them. When one fails, the others are ended within
    a minute, and one line on stderr says why.

    Args:
        first_rank, world_size: where these processes are in the whole job, for messages.
    Raises: SystemExit with the exit code of the processes, unless all succeeded.
    """
    # Made here, it is inherited, and removed even if a process is killed.
    multiprocessing.util.get_temp_dir()
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(count)]
    with blocked_signals():
        context = start_processes(
            run_one,
            (function, argument, [sender for _, sender in pipes]),
            nprocs=count,
            join=False,
        )
        job = Job(context.processes, [receiver for receiver, _ in pipes])
        with handled_signals(STOPPING, job.forward), unblocked_signals():
            job.wait()
    ranks = range(first_rank, first_rank + count)
    code, sentence = job.verdict(ranks, world_size or count)
    if sentence:
        print(f"error: {sentence}", file=sys.stderr)
    if code:
        sys.exit(code)


def run_one(
    index: int, function: Callable[[int, Any], None], argument: Any, senders: list[Connection]
) -> None:
    """Run as one of several processes, and say how it ended.

    Raises: SystemExit always.
    """
    # Ctrl-C in a terminal reaches all its processes; each is to get it once, from the first one.
    os.setsid()
    quiet_libraries()
    outcome = Outcome(EXIT_INTERRUPTED, time.time())
    try:
        with stopping_early(), unblocked_signals():
            function(index, argument)
        outcome = Outcome(0, time.time())
    except SystemExit as end:
        outcome = Outcome(end.code if isinstance(end.code, int) else 1, time.time())
        if outcome.code not in (0, EXIT_STOPPED, EXIT_INTERRUPTED):
            outcome = Outcome(outcome.code, time.time(), f"ended with exit code {outcome.code}")
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        with undisturbed():
            failure = read_failure(error)
            sentence = failure.sentence(log_failure(failure))
        outcome = Outcome(1, time.time(), sentence, failure.is_consequence)
        if wants_traceback():
            traceback.print_exc()
    # Before the group is left, which may take long if others hang.
    senders[index].send(outcome)
    if distributed.is_initialized():
        # At the exit of the process gloo's threads, if they still run, abort it.
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()
    sys.exit(outcome.code)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Let the signals that stop a job wait, here and in processes that are started meanwhile.

    What arrives while a process imports its modules then waits until it can deal with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def unblocked_signals() -> Iterator[None]:
    """Undo `blocked_signals`, also that of the parent process, within a block."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handled_signals(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Call a handler for signals within a block; those that are ignored stay so."""
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number, earlier in before.items() if earlier != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def stopping_early() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and SIGUSR1 stop a run that has not begun; training has handlers of its own."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(EXIT_STOPPED)

    return handled_signals((signal.SIGTERM, signal.SIGUSR1), stop)
