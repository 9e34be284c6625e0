"""Share between Triton kernels: GELU and sizes of tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import INTERPRETED, ceil_divide

# Programs that sum over pixels, each of neighboring ones; a second step adds their sums.
PARTS = 1024


@triton.jit
def _upper_tail(x):
    """Return 1 - Phi(abs(x)) of the normal distribution as a power of two.

    The exponent is a polynomial fitted to its logarithm for abs(x) up to 5.5, which falls
    beyond: off by 6e-8 at most, and by 6e-5 of itself. A third of the instructions of ``erf``.
    """
    size = tl.minimum(tl.abs(x), 16.0)
    power = -8.502047014e-07 * size + 1.472730697e-05
    power = power * size - 6.690856687e-05
    power = power * size - 4.227099828e-04
    power = power * size + 7.421423616e-03
    power = power * size - 5.272364885e-02
    power = power * size - 4.591434005e-01
    power = power * size - 1.151111091e00
    return tl.exp2(power * size - 1.0)


@triton.jit
def gelu(x):
    """Return the exact GELU of float32, to about its precision."""
    return tl.where(x < 0.0, 0.0, x) - tl.minimum(tl.abs(x), 16.0) * _upper_tail(x)


@triton.jit
def gelu_slope(x):
    """Return the derivative of :func:`gelu`."""
    tail = _upper_tail(x)
    density = tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361595)
    return tl.where(x < 0.0, tail, 1.0 - tail) + x * density


def has_tensor_cores(dtype: torch.dtype) -> bool:
    """Tell whether products in a type are for ``tl.dot``: float32 would lose digits."""
    # The interpreter multiplies the bits of bfloat16 as integers.
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not INTERPRETED)


def row_tile(channels: int) -> tuple[int, int]:
    """Return rows and padded channels of a tile of whole rows: at most 4096 values."""
    padded = triton.next_power_of_2(channels)
    return min(64, max(1, 4096 // padded)), padded


def divide(rows: int, tile: int, images: int = 1) -> tuple[int, int]:
    """Return tiles of rows for each of about ``PARTS`` programs, and their number."""
    steps = ceil_divide(ceil_divide(rows, tile), max(1, PARTS // images))
    return steps, ceil_divide(rows, tile * steps)


def per_pixel(valid: Tensor | None, like: Tensor) -> Tensor:
    """Return the mask of valid pixels, or any tensor where there is none."""
    return like if valid is None else valid.to(like.dtype).contiguous()
