"""A whole block without autograd, by ``native.cpp`` where that is the faster."""

from typing import cast

import torch
from torch import Tensor

from . import inference
from .native import MOST_LEVELS, Library, library
from .parameters import BlockWeights

# The weights of blocks of more channels leave the cache.
WIDE = 384


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`focalnet_det.ops.kernels.inference.block`."""
    channels, pixels = x.shape[-1], x.shape[:-1].numel()
    # The library copies all weights into another order, which has to pay.
    pays = channels <= WIDE or pixels >= 2 * channels
    if dtype != torch.float32 or not 0 < len(weights.modulation.kernels) <= MOST_LEVELS or not pays:
        return inference.block(x, weights, valid, dtype)
    native = cast(Library, library())
    return native.block(x.to(dtype), weights.to(dtype), valid).to(x.dtype)
