"""Stop a training gracefully on Ctrl-C and on signals of job schedulers."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ..supervise import EXIT_INTERRUPTED, EXIT_STOPPED, announce

# Seconds. A launcher and a scheduler may both forward a signal; duplicates within this time are
# ignored.
DUPLICATE_WINDOW = 1.0

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)


class RunStopped(Exception):
    """Signal that the run stops on request, with its state saved.

    Attributes:
        signal: number.
        iterations: completed iterations.
    """

    def __init__(self, number: int, iterations: int) -> None:
        super().__init__(number, iterations)  # pickling recreates the exception from these
        self.signal = number
        self.iterations = iterations

    def __str__(self) -> str:
        name = signal.Signals(self.signal).name
        return (
            f"Stopped by {name} after iteration {self.iterations}. The state is saved; continue "
            "with --resume."
        )

    @property
    def exit_code(self) -> int:
        """Exit code: 130 after Ctrl-C, otherwise one that asks schedulers to requeue the job."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED


class StopSignals:
    """Context manager that records the first stop signal; a second one ends the process.

    Outside the main thread it does nothing.

    Args:
        quiet: print nothing to standard error, for all processes but the main one.

    Attributes:
        received: number of the received signal, 0 for none.
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
        if self.received and time.monotonic() - self._since < DUPLICATE_WINDOW:
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        self._since = time.monotonic()
        if not self.quiet:
            announce(number)
