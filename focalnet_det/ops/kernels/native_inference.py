"""A whole block without autograd, by ``native.cpp`` where that is the faster."""

from typing import cast

import torch
from torch import Tensor

from . import inference
from .native import MOST_LEVELS, Library, library
from .parameters import BlockWeights

# The library copies all weights into another order at every call. Those of wide blocks leave the
# cache: they take many pixels to pay, or, beyond, never do.
NARROW, WIDE = 192, 384
MANY_PIXELS = 2048


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`focalnet_det.ops.kernels.inference.block`."""
    levels, channels = len(weights.modulation.kernels), x.shape[-1]
    widest = WIDE if x.shape[:-1].numel() >= MANY_PIXELS else NARROW
    if dtype != torch.float32 or channels > widest or not 0 < levels <= MOST_LEVELS:
        return inference.block(x, weights, valid, dtype)
    native = cast(Library, library())
    return native.block(x.to(dtype), weights.to(dtype), valid).to(x.dtype)
