"""A whole block without autograd, by ``native.cpp`` where that is the faster."""

from typing import cast

import torch
from torch import Tensor

from . import inference
from .native import DTYPES, MOST_LEVELS, Library, library
from .parameters import BlockWeights

# The library copies all weights into another order at every call. Those of wide blocks leave the
# cache: they take many pixels to pay, or, beyond, never do.
NARROW, WIDE = 192, 384
MANY_PIXELS = 2048


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`focalnet_det.ops.kernels.inference.block`."""
    native = cast(Library, library())
    if not _takes(native, x, weights, dtype):
        return inference.block(x, weights, valid, dtype)
    return native.block(x, weights, valid, dtype)


def _takes(native: Library, x: Tensor, weights: BlockWeights, dtype: torch.dtype) -> bool:
    if not 0 < len(weights.modulation.kernels) <= MOST_LEVELS or x.dtype not in DTYPES:
        return False
    if dtype == torch.bfloat16:
        return native.has_tiles
    widest = WIDE if x.shape[:-1].numel() >= MANY_PIXELS else NARROW
    return dtype == torch.float32 and x.shape[-1] <= widest
