"""Protect loader workers from signals sent to the whole job, and clean up their temporary files."""

import multiprocessing.util
import os
import signal
import sys
import threading
from types import TracebackType
from typing import TypeVar

from torch.utils.data import DataLoader

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}

Loader = TypeVar("Loader", bound=DataLoader)


def protect_workers(loader: Loader) -> Loader:
    """Keep the workers of a loader alive when the job receives a signal to stop.

    Training needs their batches until it has saved a checkpoint. They still exit when the parent
    process terminates them or dies.
    """
    if loader.num_workers:
        loader.worker_init_fn = ignore_signals
        # Child processes inherit this folder, and the parent removes it. A terminated worker would
        # leave its own behind.
        multiprocessing.util.get_temp_dir()
    return loader


def ignore_signals(_worker: int) -> None:
    """Ignore SIGINT, SIGUSR1 and any SIGTERM not sent by the parent; a ``worker_init_fn``."""
    sys.excepthook = _print_unless_connection_lost
    if not hasattr(signal, "sigwaitinfo"):
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        return
    # Unlike Python's signal handlers, `sigwaitinfo` tells the sender of a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_exit_on_parent_sigterm, args=(os.getppid(),), daemon=True).start()


def _print_unless_connection_lost(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print uncaught exceptions, except lost connections to a parent that was killed."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _exit_on_parent_sigterm(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
