"""Recognize images that were evaluated before."""

import logging
from collections.abc import Container

logger = logging.getLogger(__name__)


def is_repeated(image: int | str, evaluated: Container[int | str]) -> bool:
    """Return whether an image was evaluated before, and log a warning if it was."""
    if image not in evaluated:
        return False
    logger.warning("Image %s was predicted more than once. Only the first result counts.", image)
    return True
