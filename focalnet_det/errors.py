"""How tools report bad input, and only that."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# What the package raises on bad input and bad surroundings; anything else is a defect of ours.
EXPECTED = (ValueError, KeyError, TypeError, OSError, ImportError, FloatingPointError)

# Remarks of libraries about themselves that no user of ours can act on.
NOISE = (
    ".*torch.jit.script.*",
    ".*torch.meshgrid.*",
    ".*TypedStorage is deprecated.*",
    ".*not writable.*",
    "Grad strides do not match bucket view strides.*",
)


def quiet_libraries() -> None:
    """Hides the remarks in ``NOISE`` from this process."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("torch.utils.cpp_extension", "detectron2.data.datasets.coco"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns expected errors into one line on stderr and exit status 1; silences known noise.

    ``FOCALNET_DET_TRACEBACK=1`` shows the traceback instead.
    """
    quiet_libraries()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except EXPECTED as error:
        if os.getenv("FOCALNET_DET_TRACEBACK"):
            raise
        # str() of a KeyError is quoted.
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
