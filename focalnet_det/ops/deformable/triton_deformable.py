"""Compute multi-scale deformable attention in Triton, with samples summed in registers.

A program has some queries of one head. Sizes of levels come from a small tensor, so that a new
image size compiles nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 16


@triton.jit
def _corner(value, row, column, height, width, start, stride, channels, inside):
    """Read the channels of cells, (queries, channels) float32, zero outside the level."""
    valid = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cell = start + row * width + column
    mask = valid[:, None] & inside
    read = tl.load(value + cell[:, None] * stride + channels[None, :], mask=mask, other=0.0)
    return read.to(tl.float32), cell, mask


@triton.jit
def _pixel(locations, pair, height, width, mask):
    """Return the corner above left of locations, and their fractions."""
    x = tl.load(locations + pair * 2, mask=mask, other=-9.0) * width - 0.5
    y = tl.load(locations + pair * 2 + 1, mask=mask, other=-9.0) * height - 0.5
    # Beyond these limits all corners are outside, and numbers could overflow.
    x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)
    y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _forward(
    value, levels, locations, weights, out, cells, queries, heads, channels,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    asked = query < queries
    inside = asked[:, None] & (channel < channels)[None, :]
    row_of = (image.to(tl.int64) * queries + query) * heads + head
    stride = heads * channels
    value += image.to(tl.int64) * cells * stride + head * channels
    total = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for level in range(LEVELS):
        height, width = tl.load(levels + level * 3), tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        for point in range(POINTS):
            pair = (row_of * LEVELS + level) * POINTS + point
            left, top, dx, dy = _pixel(locations, pair, height, width, asked)
            weight = tl.load(weights + pair, mask=asked, other=0.0)
            a, _, _ = _corner(value, top, left, height, width, start, stride, channel, inside)
            b, _, _ = _corner(value, top, left + 1, height, width, start, stride, channel, inside)
            c, _, _ = _corner(value, top + 1, left, height, width, start, stride, channel, inside)
            d, _, _ = _corner(
                value, top + 1, left + 1, height, width, start, stride, channel, inside
            )
            above = a * (1 - dx)[:, None] + b * dx[:, None]
            below = c * (1 - dx)[:, None] + d * dx[:, None]
            sample = above * (1 - dy)[:, None] + below * dy[:, None]
            total += sample * weight[:, None]
    tl.store(out + row_of[:, None] * channels + channel[None, :], total, mask=inside)


@triton.jit
def _backward(
    value, levels, locations, weights, grad_out, grad_value, grad_locations, grad_weights,
    cells, queries, heads, channels,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    asked = query < queries
    inside = asked[:, None] & (channel < channels)[None, :]
    row_of = (image.to(tl.int64) * queries + query) * heads + head
    stride = heads * channels
    value += image.to(tl.int64) * cells * stride + head * channels
    grad_value += image.to(tl.int64) * cells * stride + head * channels
    upper = tl.load(
        grad_out + row_of[:, None] * channels + channel[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    for level in range(LEVELS):
        height, width = tl.load(levels + level * 3), tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        for point in range(POINTS):
            pair = (row_of * LEVELS + level) * POINTS + point
            left, top, dx, dy = _pixel(locations, pair, height, width, asked)
            weight = tl.load(weights + pair, mask=asked, other=0.0)
            a, cell_a, at_a = _corner(
                value, top, left, height, width, start, stride, channel, inside
            )
            b, cell_b, at_b = _corner(
                value, top, left + 1, height, width, start, stride, channel, inside
            )
            c, cell_c, at_c = _corner(
                value, top + 1, left, height, width, start, stride, channel, inside
            )
            d, cell_d, at_d = _corner(
                value, top + 1, left + 1, height, width, start, stride, channel, inside
            )
            scaled = upper * weight[:, None]
            fa, fb = ((1 - dx) * (1 - dy))[:, None], (dx * (1 - dy))[:, None]
            fc, fd = ((1 - dx) * dy)[:, None], (dx * dy)[:, None]
            here = grad_value + channel[None, :]
            tl.atomic_add(here + cell_a[:, None] * stride, scaled * fa, mask=at_a)
            tl.atomic_add(here + cell_b[:, None] * stride, scaled * fb, mask=at_b)
            tl.atomic_add(here + cell_c[:, None] * stride, scaled * fc, mask=at_c)
            tl.atomic_add(here + cell_d[:, None] * stride, scaled * fd, mask=at_d)
            by_weight = tl.sum(upper * (a * fa + b * fb + c * fc + d * fd), axis=1)
            along_x = (b - a) * (1 - dy)[:, None] + (d - c) * dy[:, None]
            along_y = (c - a) * (1 - dx)[:, None] + (d - b) * dx[:, None]
            by_x = tl.sum(scaled * along_x, axis=1) * width
            by_y = tl.sum(scaled * along_y, axis=1) * height
            tl.store(grad_weights + pair, by_weight, mask=asked)
            tl.store(grad_locations + pair * 2, by_x, mask=asked)
            tl.store(grad_locations + pair * 2 + 1, by_y, mask=asked)


def _levels(shapes: Sequence[int], device: torch.device) -> Tensor:
    """Return height, width and first cell of each level, int32 (L, 3)."""
    rows, start = [], 0
    for height, width in zip(shapes[0::2], shapes[1::2], strict=True):
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _launch(
    kernel: Any, value: Tensor, shapes: list[int], locations: Tensor, *rest: Tensor
) -> None:
    n, cells, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    if n * queries * heads * channels == 0:
        return
    kernel[(triton.cdiv(queries, QUERIES), n * heads)](
        value, _levels(shapes, value.device), locations, *rest,
        cells, queries, heads, channels,
        LEVELS=levels, POINTS=points, BLOCK=QUERIES, WIDTH=triton.next_power_of_2(channels),
    )  # fmt: skip


@torch.library.custom_op("focalnet_det::deformable_attention", mutates_args=())
def _deformable(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return the sums, (N, Q, heads, D), in the type of ``value``; ``shapes`` is flat."""
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    out = value.new_zeros(value.shape[0], locations.shape[1], *value.shape[2:])
    _launch(_forward, value, shapes, locations, weights, out)
    return out


@_deformable.register_fake
def _(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG001
    return value.new_empty(value.shape[0], locations.shape[1], *value.shape[2:])


@torch.library.custom_op("focalnet_det::deformable_attention_backward", mutates_args=())
def _deformable_backward(
    grad_out: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights."""
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    # Many queries add to one cell: in half precision the sum would stand still.
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grads = torch.zeros_like(locations), torch.zeros_like(weights)
    _launch(_backward, value, shapes, locations, weights, grad_out.contiguous(), grad_value, *grads)
    return grad_value.to(value.dtype), *grads


@_deformable_backward.register_fake
def _(
    grad_out: Tensor,  # noqa: ARG001
    value: Tensor,
    shapes: list[int],  # noqa: ARG001
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), torch.empty_like(locations), torch.empty_like(weights)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.focalnet_det.deformable_attention_backward(
        grad_out, value, ctx.shapes, locations, weights
    )
    return grads[0], None, grads[1], grads[2]


_deformable.register_autograd(_gradients, setup_context=_keep)


def triton_deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Return the sums, (N, Q, heads, D), in the type of ``value``.

    A registered operator, so that compiled graphs hold it. Arguments as in
    :func:`focalnet_det.ops.deformable_attention.deformable_attention`; locations and weights are
    float32. Gradients of the value are added in no fixed order.
    """
    flat = [side for shape in shapes for side in shape]
    out: Tensor = torch.ops.focalnet_det.deformable_attention(value, flat, locations, weights)
    return out
