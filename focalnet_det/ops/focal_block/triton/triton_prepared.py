"""Prepare parameters of a modulation as the Triton kernels read them.

Made at each call: nothing tells reliably that a parameter has changed. Fused optimizers and writes
to ``data`` leave its version as it was.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import Affine, ModulationWeights

# Values of a row of the projection are padded to a multiple of this: 16 bytes in 16 bits.
ALIGNMENT = 8


class Projection(NamedTuple):
    """What makes the contexts of a modulation.

    Attributes:
        f: weight and bias with rows that nobody reads, so that rows of its result are aligned.
        taps: (k * k, C), float32, of each level.
    """

    f: Affine
    taps: list[Tensor]


def projection(weights: ModulationWeights) -> Projection:
    """Concatenate weights in the type to compute in, one launch for each tensor."""
    f = weights.f
    missing = padded_columns(len(weights.h.weight), len(weights.kernels)) - len(f.weight)
    # The first row once more: finite, and without a kernel that writes zeros.
    weight = torch.cat((f.weight, f.weight[:1].expand(missing, -1)))
    bias = torch.cat((f.bias, f.bias[:1].expand(missing)))
    return Projection(Affine(weight, bias), [taps(kernel) for kernel in weights.kernels])


def padded_columns(channels: int, levels: int) -> int:
    """Return the columns of the projection: query, context and gates, and padding."""
    return 2 * channels + -(-(levels + 1) // ALIGNMENT) * ALIGNMENT


def taps(kernel: Tensor, *, turned: bool = False) -> Tensor:
    """Turn (C, 1, k, k) into (k * k, C), float32, turned around for the gradient by the input."""
    flat = (kernel.flip(2, 3) if turned else kernel).flatten(1).t()
    return torch.empty_like(flat, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(
        flat
    )
