"""Where the log of a run goes: the screen of the main process, and a file per process."""

import inspect
import logging
import logging.handlers
import sys
from pathlib import Path

from detectron2.utils.logger import setup_logger

# Detectron2's words are for the file; the screen is for the run itself.
ON_SCREEN = ("focalnet_det",)
NAMES = ("fvcore", "detectron2", *ON_SCREEN)

# What the last run of this process attached.
_attached: list[tuple[logging.Logger, logging.Handler]] = []


class RunLog(logging.FileHandler):
    """A log file that warns once, and no more, if it cannot be written."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        """Say once what is wrong; later records are tried, as the disk may have room again."""
        if not self.has_failed:
            self.has_failed = True
            print(
                f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]}); the run "
                "goes on, its log is incomplete.",
                file=sys.stderr,
            )


def hold_records() -> None:
    """Keep what focalnet_det logs until :func:`start_logs` knows where it belongs.

    Detaches the log of an earlier run in this process.
    """
    _detach()
    logger = logging.getLogger("focalnet_det")
    logger.setLevel(logging.DEBUG)
    never = logging.CRITICAL + 1
    _attach(logger, logging.handlers.MemoryHandler(10_000, never, flushOnClose=False))


def start_logs(folder: Path, rank: int) -> None:
    """Log to the screen, if `rank` is 0, and to `log.txt` or `log.txt.rankN`; pass on what is held.

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
    for name in NAMES:
        logger = logging.getLogger(name)
        before = list(logger.handlers)
        # Without its cache, which would leave a second run of this process without a screen.
        inspect.unwrap(setup_logger)(None, rank, name=name, abbrev_name=name)
        for screen in [handler for handler in logger.handlers if handler not in before]:
            _attached.append((logger, screen))
            # Details and tracebacks, logged as DEBUG, are for the file.
            screen.setLevel(logging.INFO if name in ON_SCREEN else logging.CRITICAL)
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
