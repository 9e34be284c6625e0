"""Signals that ask a training to stop: Ctrl-C, and those of schedulers."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ..supervise import EXIT_INTERRUPTED, EXIT_STOPPED, announce

# A launcher and a scheduler may both pass on one signal: the second copy is no second wish.
ONE_SIGNAL = 1.0  # seconds

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)


class RunStopped(Exception):
    """A signal asked the run to stop, and its state is saved.

    Attributes:
        signal: its number.
        iterations: that were done.
    """

    def __init__(self, number: int, iterations: int) -> None:
        super().__init__(number, iterations)  # a copy for another process is made from these
        self.signal = number
        self.iterations = iterations

    def __str__(self) -> str:
        name = signal.Signals(self.signal).name
        return (
            f"Stopped by {name} after iteration {self.iterations}; the state is saved. Continue "
            "with --resume."
        )

    @property
    def exit_code(self) -> int:
        """Exit status of the process: 130 after Ctrl-C, otherwise one that means "run again"."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED


class StopSignals:
    """Note the first stop signal instead of dying from it; the second one ends the process.

    A context manager; outside the main thread it does nothing.

    Args:
        quiet: say nothing on standard error, as all processes but the first.

    Attributes:
        received: number of the signal that came, 0 for none.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._since < ONE_SIGNAL:
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        self._since = time.monotonic()
        if not self.quiet:
            announce(number)
