"""Run norm, MLP and residual of a pixel in one kernel: inference in 16 bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import Affine, MlpWeights
from .triton_common import gelu, has_tensor_cores
from .triton_launch import ceil_divide, kernel

# Beyond, a tile of rows and their sums do not fit into registers, and products are not held back by
# memory: its two products and a GELU between them are the better choice.
MOST_CHANNELS = 128

_TILES = [
    ({"ROWS": 64, "HIDDEN": 32}, 4),
    ({"ROWS": 64, "HIDDEN": 32}, 8),
    ({"ROWS": 128, "HIDDEN": 32}, 8),
    ({"ROWS": 128, "HIDDEN": 64}, 8),
]


@kernel(*_TILES, key=["C", "UNITS"])
def mlp_kernel(
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, out, eps, rows,
    C: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Hold the hidden layer ``HIDDEN`` units at a time, in registers alone."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    inside = channels < C
    mask = (row < rows)[:, None] & inside[None, :]
    place = row[:, None] * C + channels[None, :]
    normed = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(normed, axis=1) / C
    normed = tl.where(inside[None, :], normed - mean[:, None], 0.0)
    deviation = tl.rsqrt(tl.sum(normed * normed, axis=1) / C + eps)
    scale = tl.load(norm_weight + channels, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + channels, mask=inside, other=0.0).to(tl.float32)
    normed = normed * deviation[:, None] * scale[None, :] + shift[None, :]
    normed = normed.to(weight1.dtype.element_ty)
    sums = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    for first in range(0, UNITS, HIDDEN):
        unit = first + tl.arange(0, HIDDEN)
        present = unit < UNITS
        both = inside[:, None] & present[None, :]
        place1 = unit[None, :] * C + channels[:, None]
        part = tl.dot(normed, tl.load(weight1 + place1, mask=both, other=0.0))
        part += tl.load(bias1 + unit, mask=present, other=0.0).to(tl.float32)[None, :]
        activation = gelu(part).to(weight1.dtype.element_ty)
        both = present[:, None] & inside[None, :]
        place2 = channels[None, :] * UNITS + unit[:, None]
        sums = tl.dot(activation, tl.load(weight2 + place2, mask=both, other=0.0), sums)
    sums += tl.load(bias2 + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    # Read once more: kept since the start, it would not leave enough registers for the sums.
    sums += tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, sums, mask=mask)


def takes(weights: MlpWeights) -> bool:
    """Tell whether :func:`mlp` takes them."""
    weight = weights.fc1.weight
    return has_tensor_cores(weight.dtype) and weight.shape[1] <= MOST_CHANNELS


def mlp(x: Tensor, norm: Affine, weights: MlpWeights) -> Tensor:
    """Return ``x + fc2(gelu(fc1(norm(x))))`` with weights that :func:`takes` accepts."""
    c = x.shape[-1]
    rows, out = x.numel() // c, torch.empty_like(x)
    mlp_kernel(
        lambda meta: (ceil_divide(rows, meta["ROWS"]),),
        x, norm.weight, norm.bias, *weights.fc1[:2], *weights.fc2[:2], out, norm.eps, rows,
        C=c, UNITS=len(weights.fc1.weight), PADDED=max(16, triton.next_power_of_2(c)),
    )  # fmt: skip
    return out
