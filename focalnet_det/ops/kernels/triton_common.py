"""What the Triton kernels share: GELU, candidates for tuning, sizes of tiles."""

import os
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Kernels then run in NumPy on the CPU, one program after the other: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def gelu(x):
    """Exact GELU of float32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    """Derivative of :func:`gelu`."""
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density


def candidates(*choices: tuple[dict[str, int], int]) -> list[Any]:
    """Settings to choose from, (tile sizes, warps) each; the first alone where nothing is timed.

    No choice depends on the size of a map: training at many sizes would time each of them.
    """
    chosen = choices[:1] if INTERPRETED else choices
    return [triton.Config(sizes, num_warps=warps) for sizes, warps in chosen]


def row_tile(channels: int) -> tuple[int, int]:
    """Rows and padded channels of a tile that holds whole rows: about 4096 values."""
    padded = triton.next_power_of_2(channels)
    return max(1, 4096 // padded), padded


def per_pixel(valid: Tensor | None, like: Tensor) -> Tensor:
    """The mask of valid pixels, or any tensor where there is none."""
    return like if valid is None else valid.to(like.dtype).contiguous()
