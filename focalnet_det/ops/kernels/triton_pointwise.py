"""Per-pixel kernels between the matrix products of a block on GPUs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import gelu, gelu_slope, per_pixel, row_tile


@triton.jit
def product_kernel(
    query, local, bias, gates, shared, out, stride, gate, divisor, pixels, rows, c,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """``query * (local + bias + gate * shared)``, the last one once for each image."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    there, inside = row < rows, channels < c
    mask = there[:, None] & inside[None, :]
    weight = tl.load(gates + row * stride + gate, mask=there, other=0.0).to(tl.float32) / divisor
    image = (row // pixels)[:, None] * c + channels[None, :]
    modulator = tl.load(local + row[:, None] * c + channels[None, :], mask=mask, other=0.0)
    modulator = modulator.to(tl.float32)
    modulator += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    modulator += weight[:, None] * tl.load(shared + image, mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * stride + channels[None, :]
    value = tl.load(query + place, mask=mask, other=0.0).to(tl.float32) * modulator
    tl.store(out + row[:, None] * c + channels[None, :], value, mask=mask)


@triton.jit
def aggregate_kernel(
    levels, gates, shared, valid, total, after,
    level_stride, stride, gate, divisor, pixels, rows, c,
    LEVELS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Gated sum of all contexts, and all levels but the last after their GELU."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    there, inside = row < rows, channels < c
    mask = there[:, None] & inside[None, :]
    place = row[:, None] * c + channels[None, :]
    gates += row * stride + gate
    weight = tl.load(gates + LEVELS, mask=there, other=0.0).to(tl.float32) / divisor
    image = (row // pixels)[:, None] * c + channels[None, :]
    value = weight[:, None] * tl.load(shared + image, mask=mask, other=0.0)
    for level in tl.static_range(LEVELS):
        where = place + level * level_stride
        context = gelu(tl.load(levels + where, mask=mask, other=0.0).to(tl.float32))
        if MASKED:
            context = context * tl.load(valid + row, mask=there, other=0.0).to(tl.float32)[:, None]
        if level < LEVELS - 1:
            tl.store(after + where, context, mask=mask)
        weight = tl.load(gates + level, mask=there, other=0.0).to(tl.float32) / divisor
        value += weight[:, None] * context
    tl.store(total + place, value, mask=mask)


@triton.jit
def product_backward_kernel(
    query, modulator, gradient, by_query, by_modulator, stride, rows, c,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Both gradients of ``query * modulator``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    mask = (row < rows)[:, None] & (channels < c)[None, :]
    place, wide = (
        (row * c)[:, None] + channels[None, :],
        (row * stride)[:, None] + channels[None, :],
    )
    outer = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(modulator + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(by_query + wide, outer * value, mask=mask)
    value = tl.load(query + wide, mask=mask, other=0.0).to(tl.float32)
    tl.store(by_modulator + place, outer * value, mask=mask)


@triton.jit
def gates_backward_kernel(
    by_total, levels, gates, shared, by_last, valid, by_gates, by_level,
    level_stride, stride, gate, columns, divisor, pixels, rows, c,
    LEVELS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Gradients by all gates, and by the last level before its GELU.

    ``by_last`` is what the global mean adds to the gradient of every pixel of an image.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    there, inside = row < rows, channels < c
    mask = there[:, None] & inside[None, :]
    place = row[:, None] * c + channels[None, :]
    gates += row * stride + gate
    by_gates += row * stride + gate
    outer = tl.load(by_total + place, mask=mask, other=0.0).to(tl.float32)
    image = (row // pixels)[:, None] * c + channels[None, :]
    dot = tl.sum(outer * tl.load(shared + image, mask=mask, other=0.0), axis=1)
    tl.store(by_gates + LEVELS, dot / divisor, mask=there)
    for column in range(LEVELS + 1, columns):
        tl.store(by_gates + column, tl.zeros((ROWS,), dtype=tl.float32), mask=there)
    inner = tl.zeros((ROWS,), dtype=tl.float32) + 1.0
    if MASKED:
        inner = tl.load(valid + row, mask=there, other=0.0).to(tl.float32)
    for level in tl.static_range(LEVELS):
        where = place + level * level_stride
        before = tl.load(levels + where, mask=mask, other=0.0).to(tl.float32)
        dot = tl.sum(outer * gelu(before), axis=1) * inner
        tl.store(by_gates + level, dot / divisor, mask=there)
        if level == LEVELS - 1:
            weight = tl.load(gates + level, mask=there, other=0.0).to(tl.float32) / divisor
            value = outer * weight[:, None] + tl.load(by_last + image, mask=mask, other=0.0)
            tl.store(by_level + place, value * inner[:, None] * gelu_slope(before), mask=mask)


@triton.jit
def gelu_backward_kernel(hidden, gradient, activation, by_hidden, count, SIZE: tl.constexpr):
    """GELU once more and its gradient, in one pass."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < count
    value = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
    outer = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(activation + place, gelu(value), mask=mask)
    tl.store(by_hidden + place, outer * gelu_slope(value), mask=mask)


def product(
    projected: Tensor, local: Tensor, bias: Tensor, shared: Tensor, gate: int, divisor: float
) -> Tensor:
    """Query times modulator.

    Args:
        projected: (N, H, W, columns): the query in the first C columns, the gate of the global
            context in column ``gate``.
        local: (N, H, W, C), ``h`` of the gated sum of the levels, without its bias.
        bias: (C,), of ``h``.
        shared: (N, C), ``h`` of the global context, without its bias.
        gate, divisor: of the global context's gate.
    Returns: (N, H, W, C).
    """
    n, h, w, c = local.shape
    rows, padded = row_tile(c)
    out = torch.empty_like(local)
    product_kernel[(triton.cdiv(n * h * w, rows),)](
        projected, local, bias, projected, shared, out, projected.stride(2), gate, divisor,
        h * w, n * h * w, c, ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return out


def aggregate(
    levels: Tensor, projected: Tensor, shared: Tensor, valid: Tensor | None, divisor: float
) -> tuple[Tensor, Tensor]:
    """Gated sum of all contexts, (N, H, W, C), and (L-1, N, H, W, C) levels after their GELU.

    Args:
        levels: (L, N, H, W, C), before their GELU.
        projected: (N, H, W, columns), the gates after the first 2C columns.
        shared: (N, C), the global context.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        divisor: of the gates.
    """
    count, n, h, w, c = levels.shape
    rows, padded = row_tile(c)
    total = torch.empty_like(levels[0])
    after = levels.new_empty(max(count - 1, 1), n, h, w, c)
    aggregate_kernel[(triton.cdiv(n * h * w, rows),)](
        levels, projected, shared, per_pixel(valid, levels), total, after, levels.stride(0),
        projected.stride(2), 2 * c, divisor, h * w, n * h * w, c,
        LEVELS=count, MASKED=valid is not None, ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return total, after


def product_backward(
    projected: Tensor, modulator: Tensor, gradient: Tensor, by_projected: Tensor
) -> Tensor:
    """Gradient by the modulator, (N, H, W, C); that by the query goes to ``by_projected``."""
    n, h, w, c = modulator.shape
    rows, padded = row_tile(c)
    by_modulator = torch.empty_like(modulator)
    product_backward_kernel[(triton.cdiv(n * h * w, rows),)](
        projected, modulator, gradient, by_projected, by_modulator, projected.stride(2),
        n * h * w, c, ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return by_modulator


def gates_backward(
    by_total: Tensor,
    levels: Tensor,
    projected: Tensor,
    shared: Tensor,
    by_last: Tensor,
    valid: Tensor | None,
    divisor: float,
    by_projected: Tensor,
) -> Tensor:
    """Gradient by the last level before its GELU; those by the gates go to ``by_projected``.

    Args:
        by_total: (N, H, W, C), by the gated sum.
        by_last: (N, C), by the last level after its GELU, through the global mean.
        levels, projected, shared, valid, divisor: as in :func:`aggregate`.
        by_projected: (N, H, W, columns); columns after the gates become zero.
    """
    count, n, h, w, c = levels.shape
    rows, padded = row_tile(c)
    by_level = torch.empty_like(by_total)
    gates_backward_kernel[(triton.cdiv(n * h * w, rows),)](
        by_total, levels, projected, shared, by_last, per_pixel(valid, levels), by_projected,
        by_level, levels.stride(0), projected.stride(2), 2 * c, projected.shape[-1] - 2 * c,
        divisor, h * w, n * h * w, c,
        LEVELS=count, MASKED=valid is not None, ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return by_level


def gelu_backward(hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of ``hidden``, and the gradient by ``hidden``; any shape, contiguous."""
    activation, by_hidden = torch.empty_like(hidden), torch.empty_like(hidden)
    count = hidden.numel()
    gelu_backward_kernel[(triton.cdiv(count, 2048),)](
        hidden, gradient, activation, by_hidden, count, SIZE=2048
    )
    return activation, by_hidden
