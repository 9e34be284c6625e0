"""Log a run to the terminal of the main process and to a file per process."""

import inspect
import logging
import logging.handlers
import sys
from pathlib import Path

from detectron2.utils.logger import setup_logger

# Messages of other libraries go to the file only.
TERMINAL_LOGGERS = ("focalnet_det",)
LOGGERS = ("fvcore", "detectron2", *TERMINAL_LOGGERS)

# Handlers of the current run, to be removed by the next one in this process.
_attached: list[tuple[logging.Logger, logging.Handler]] = []


class RunLog(logging.FileHandler):
    """Log file that warns only once if it cannot be written."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        """Warn once; later records are still tried, since disk space may become available."""
        if not self.has_failed:
            self.has_failed = True
            print(
                f"warning: cannot write {self.baseFilename} ({sys.exc_info()[1]}). The run "
                "continues, but its log is incomplete.",
                file=sys.stderr,
            )


def hold_records() -> None:
    """Buffer the records of focalnet_det until :func:`start_logs` opens the log.

    Handlers of an earlier run in this process are removed.
    """
    _detach()
    logger = logging.getLogger("focalnet_det")
    logger.setLevel(logging.DEBUG)
    never = logging.CRITICAL + 1
    _attach(logger, logging.handlers.MemoryHandler(10_000, never, flushOnClose=False))


def start_logs(folder: Path, rank: int) -> None:
    """Open the log, and write the buffered records to it.

    Args:
        folder: output folder, for `log.txt` or `log.txt.rankN`.
        rank: of this process; rank 0 also logs to the terminal.
    Raises: OSError if the file cannot be opened.
    """
    held = [
        record
        for _, handler in _attached
        if isinstance(handler, logging.handlers.MemoryHandler)
        for record in handler.buffer
    ]
    _detach()
    file = RunLog(folder / ("log.txt" if rank == 0 else f"log.txt.rank{rank}"), encoding="utf-8")
    file.setFormatter(
        logging.Formatter(
            "[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"
        )
    )
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before = list(logger.handlers)
        # Unwrapped, because its cache would leave a second run of this process without a terminal.
        inspect.unwrap(setup_logger)(None, rank, name=name, abbrev_name=name)
        for terminal in [handler for handler in logger.handlers if handler not in before]:
            _attached.append((logger, terminal))
            # DEBUG records, such as tracebacks, go to the file only.
            terminal.setLevel(logging.INFO if name in TERMINAL_LOGGERS else logging.CRITICAL)
        _attach(logger, file)
    for record in held:
        logging.getLogger(record.name).handle(record)


def _attach(logger: logging.Logger, handler: logging.Handler) -> None:
    logger.addHandler(handler)
    _attached.append((logger, handler))


def _detach() -> None:
    while _attached:
        logger, handler = _attached.pop()
        logger.removeHandler(handler)
        handler.close()
