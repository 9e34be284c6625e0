"""Apply layer norm on GPUs, from one type to another, and all of its gradients in one pass.

With autocast the map between branches is float32 and what a branch computes with is not: the stock
layer needs the map converted first, reads it twice in the backward pass, and leaves the gradient to
be converted back and added to that of the residual sum.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..weights import Affine
from .triton_common import divide, row_tile
from .triton_launch import ceil_divide, kernel


@kernel()
def norm_kernel(
    x, weight, bias, out, statistics, eps, rows,
    C: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Norm whole rows; statistics are mean and inverse deviation of each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    there, inside = row < rows, channels < C
    mask = there[:, None] & inside[None, :]
    place = row[:, None] * C + channels[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / C
    value = tl.where(inside[None, :], value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / C + eps)
    scale = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    value = value * inverse[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + place, value, mask=mask)
    tl.store(statistics + 2 * row, mean, mask=there)
    tl.store(statistics + 2 * row + 1, inverse, mask=there)


@kernel()
def norm_backward_kernel(
    gradient, x, weight, statistics, residual, grad_x, sums, steps, rows,
    C: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return the gradient by ``x`` of ``steps`` tiles, and sums of those by weight and bias."""
    channels = tl.arange(0, PADDED)
    inside = channels < C
    scale = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((PADDED,), dtype=tl.float32)
    grad_bias = tl.zeros((PADDED,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        there = row < rows
        mask = there[:, None] & inside[None, :]
        place = row[:, None] * C + channels[None, :]
        mean = tl.load(statistics + 2 * row, mask=there, other=0.0)
        inverse = tl.load(statistics + 2 * row + 1, mask=there, other=0.0)
        normed = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        normed = tl.where(mask, normed * inverse[:, None], 0.0)
        outer = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        grad_weight += tl.sum(outer * normed, axis=0)
        grad_bias += tl.sum(outer, axis=0)
        outer = outer * scale[None, :]
        along = tl.sum(outer * normed, axis=1) / C
        value = outer - (tl.sum(outer, axis=1) / C)[:, None] - normed * along[:, None]
        value = value * inverse[:, None]
        if ADD:
            value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + place, value, mask=mask)
    sums += tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(sums + channels, grad_weight, mask=inside)
    tl.store(sums + C + channels, grad_bias, mask=inside)


def norm(x: Tensor, layer: Affine, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Apply layer norm in another type.

    Args:
        x: (..., C), contiguous.
        layer: the norm.
        dtype: of the result.
    Returns: (..., C), and mean and inverse deviation of each row, (..., 2), float32.
    """
    c = x.shape[-1]
    count, (rows, padded) = x.numel() // c, row_tile(c)
    out = torch.empty_like(x, dtype=dtype)
    statistics = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
    norm_kernel(
        (ceil_divide(count, rows),),
        x, layer.weight, layer.bias, out, statistics, layer.eps, count,
        C=c, ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return out, statistics


def norm_backward(
    gradient: Tensor,
    x: Tensor,
    layer: Affine,
    statistics: Tensor,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`norm`.

    Args:
        gradient: (..., C), contiguous, of any type.
        x, layer: of :func:`norm`.
        statistics: of its result.
        residual: (..., C), contiguous, is added to the gradient by ``x``.
    Returns: those by ``x``, in its type, and by weight and bias, (C,), float32, the same for the
        same input.
    """
    c = x.shape[-1]
    count, (rows, padded) = x.numel() // c, row_tile(c)
    steps, parts = divide(count, rows)
    grad_x, sums = torch.empty_like(x), x.new_empty(parts, 2, c, dtype=torch.float32)
    norm_backward_kernel(
        (parts,),
        gradient, x, layer.weight, statistics, gradient if residual is None else residual, grad_x,
        sums, steps, count, C=c, ADD=residual is not None, ROWS=rows, PADDED=padded,
    )  # fmt: skip
    # Two tensors: results of a registered operator must not share memory.
    return grad_x, sums[:, 0].sum(0), sums[:, 1].sum(0)
