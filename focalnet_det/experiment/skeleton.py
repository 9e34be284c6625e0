"""Build models without memory for their weights, which takes almost no time."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def build_without_memory(build: Callable[[str], T]) -> T:
    """Build a model on the meta device, or on the CPU if its constructor reads tensor values.

    Args:
        build: called with the name of the device.
    Returns: the result of ``build``.
    Raises: as ``build`` does.
    """
    try:
        with torch.device("meta"):
            return build("meta")
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return build("cpu")
