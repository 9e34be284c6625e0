"""Models without memory for their weights, which take no time to build."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def without_memory(build: Callable[[str], T]) -> T:
    """Return what is built on the meta device, or on the CPU if it reads values of its tensors.

    Args:
        build: takes the name of the device; its errors pass.
    """
    try:
        with torch.device("meta"):
            return build("meta")
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return build("cpu")
