"""A whole block without autograd, by ``native.cpp`` where that is the faster."""

from typing import cast

import torch
from torch import Tensor

from . import inference
from .native import MOST_LEVELS, Library, library
from .parameters import BlockWeights

# The weights of blocks of more channels leave the cache, and the library copies all of them into
# another order at every call: MKL and oneDNN are as fast there.
WIDE = 384


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`focalnet_det.ops.kernels.inference.block`."""
    levels = len(weights.modulation.kernels)
    if dtype != torch.float32 or x.shape[-1] > WIDE or not 0 < levels <= MOST_LEVELS:
        return inference.block(x, weights, valid, dtype)
    native = cast(Library, library())
    return native.block(x.to(dtype), weights.to(dtype), valid).to(x.dtype)
