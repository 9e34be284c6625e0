"""Loader processes that signals to the whole job do not end, and that leave no files."""

import multiprocessing.util
import os
import signal
import sys
import threading
from types import TracebackType
from typing import TypeVar

from torch.utils.data import DataLoader

STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}

Loader = TypeVar("Loader", bound=DataLoader)


def protect_workers(loader: Loader) -> Loader:
    """Let the processes of a loader outlive signals that ask a job to stop.

    The training still needs their batches until it has saved. They end as before when the process
    that started them says so, or is gone.
    """
    if loader.num_workers:
        loader.worker_init_fn = ignore_signals
        # Processes of Python inherit this folder, and the first one removes it. A loader process
        # that is terminated would leave its own.
        multiprocessing.util.get_temp_dir()
    return loader


def ignore_signals(_worker: int) -> None:
    """Ignore SIGINT, SIGUSR1 and SIGTERM, but for a SIGTERM of the parent; a `worker_init_fn`."""
    sys.excepthook = _show_but_lost_connections
    if not hasattr(signal, "sigwaitinfo"):
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        return
    # Handlers in Python do not learn who sent a signal; a thread that waits for them does.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _show_but_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print what no one catches, but not that the parent was killed while it fetched a tensor."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOPPING)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
