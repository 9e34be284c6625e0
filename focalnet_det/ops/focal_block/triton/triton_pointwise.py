"""Run per-pixel kernels between the matrix products of a block on GPUs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import gelu, gelu_slope, per_pixel, row_tile
from .triton_launch import ceil_divide, kernel


@triton.jit
def _rows(pixels, C: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Return pixels of a tile, counted over all images, channels, and which of both there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED)
    return tl.program_id(1).to(tl.int64) * pixels + row, channels, row < pixels, channels < C


@kernel()
def product_kernel(
    query, local, bias, gates, shared, out, gate, scale, pixels,
    C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Compute ``query * (local + bias + gate * shared)``, the last one once for each image."""
    row, channels, there, inside = _rows(pixels, C, ROWS, PADDED)
    mask = there[:, None] & inside[None, :]
    place, wide = row[:, None] * C + channels[None, :], row[:, None] * STRIDE + channels[None, :]
    weight = tl.load(gates + row * STRIDE + gate, mask=there, other=0.0).to(tl.float32) * scale
    shared += tl.program_id(1) * C
    context = tl.load(shared + channels, mask=inside, other=0.0).to(tl.float32)
    modulator = tl.load(local + place, mask=mask, other=0.0).to(tl.float32)
    modulator += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
    modulator += weight[:, None] * context[None, :]
    value = tl.load(query + wide, mask=mask, other=0.0).to(tl.float32) * modulator
    tl.store(out + place, value, mask=mask)


@kernel()
def aggregate_kernel(
    levels, gates, shared, valid, total, after, gate, scale, pixels, all_pixels,
    C: tl.constexpr, STRIDE: tl.constexpr, LEVELS: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Compute the gated sum of all contexts, and all levels but the last after their GELU."""
    row, channels, there, inside = _rows(pixels, C, ROWS, PADDED)
    mask = there[:, None] & inside[None, :]
    place = row[:, None] * C + channels[None, :]
    gates += row * STRIDE + gate
    weight = tl.load(gates + LEVELS, mask=there, other=0.0).to(tl.float32) * scale
    shared += tl.program_id(1) * C
    value = weight[:, None] * tl.load(shared + channels, mask=inside, other=0.0)[None, :]
    for level in tl.static_range(LEVELS):
        where = place + level * all_pixels.to(tl.int64) * C
        context = gelu(tl.load(levels + where, mask=mask, other=0.0).to(tl.float32))
        if MASKED:
            context = context * tl.load(valid + row, mask=there, other=0.0).to(tl.float32)[:, None]
        if level < LEVELS - 1:
            tl.store(after + where, context, mask=mask)
        weight = tl.load(gates + level, mask=there, other=0.0).to(tl.float32) * scale
        value += weight[:, None] * context
    tl.store(total + place, value, mask=mask)


@kernel()
def gates_backward_kernel(
    grad_total, levels, gates, shared, grad_last, valid, grad_gates, grad_level,
    gate, columns, scale, pixels, all_pixels,
    C: tl.constexpr, STRIDE: tl.constexpr, LEVELS: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return the gradients by all gates, and by the last level before its GELU.

    ``grad_last`` is what the global mean adds to the gradient of every pixel of an image.
    """
    row, channels, there, inside = _rows(pixels, C, ROWS, PADDED)
    mask = there[:, None] & inside[None, :]
    place = row[:, None] * C + channels[None, :]
    gates += row * STRIDE + gate
    grad_gates += row * STRIDE + gate
    outer = tl.load(grad_total + place, mask=mask, other=0.0).to(tl.float32)
    image = tl.program_id(1) * C + channels
    dot = tl.sum(outer * tl.load(shared + image, mask=inside, other=0.0)[None, :], axis=1)
    tl.store(grad_gates + LEVELS, dot * scale, mask=there)
    for column in range(LEVELS + 1, columns):
        tl.store(grad_gates + column, tl.zeros((ROWS,), dtype=tl.float32), mask=there)
    inner = tl.zeros((ROWS,), dtype=tl.float32) + 1.0
    if MASKED:
        inner = tl.load(valid + row, mask=there, other=0.0).to(tl.float32)
    for level in tl.static_range(LEVELS):
        where = place + level * all_pixels.to(tl.int64) * C
        before = tl.load(levels + where, mask=mask, other=0.0).to(tl.float32)
        dot = tl.sum(outer * gelu(before), axis=1) * inner
        tl.store(grad_gates + level, dot * scale, mask=there)
        if level == LEVELS - 1:
            weight = tl.load(gates + level, mask=there, other=0.0).to(tl.float32) * scale
            value = outer * weight[:, None]
            value += tl.load(grad_last + image, mask=inside, other=0.0)[None, :]
            tl.store(grad_level + place, value * inner[:, None] * gelu_slope(before), mask=mask)


def product(
    projected: Tensor, local: Tensor, bias: Tensor, shared: Tensor, gate: int, divisor: float
) -> Tensor:
    """Return query times modulator.

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
    product_kernel(
        (ceil_divide(h * w, rows), n),
        projected, local, bias, projected, shared, out, gate, 1 / divisor, h * w,
        C=c, STRIDE=projected.stride(2), ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return out


def aggregate(
    levels: Tensor, projected: Tensor, shared: Tensor, valid: Tensor | None, divisor: float
) -> tuple[Tensor, Tensor]:
    """Return the gated sum of all contexts, (N, H, W, C), and (L-1, N, H, W, C) levels.

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
    aggregate_kernel(
        (ceil_divide(h * w, rows), n),
        levels, projected, shared, per_pixel(valid, levels), total, after,
        2 * c, 1 / divisor, h * w, n * h * w, C=c, STRIDE=projected.stride(2), LEVELS=count,
        MASKED=valid is not None, ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return total, after


def gates_backward(
    grad_total: Tensor,
    levels: Tensor,
    projected: Tensor,
    shared: Tensor,
    grad_last: Tensor,
    valid: Tensor | None,
    divisor: float,
    grad_projected: Tensor,
) -> Tensor:
    """Return the gradient by the last level before its GELU; write those by the gates.

    Args:
        grad_total: (N, H, W, C), by the gated sum.
        grad_last: (N, C), by the last level after its GELU, through the global mean.
        levels, projected, shared, valid, divisor: as in :func:`aggregate`.
        grad_projected: (N, H, W, columns); columns after the gates become zero.
    """
    count, n, h, w, c = levels.shape
    rows, padded = row_tile(c)
    grad_level = torch.empty_like(grad_total)
    gates_backward_kernel(
        (ceil_divide(h * w, rows), n),
        grad_total, levels, projected, shared, grad_last, per_pixel(valid, levels), grad_projected,
        grad_level, 2 * c, projected.shape[-1] - 2 * c, 1 / divisor, h * w, n * h * w,
        C=c, STRIDE=projected.stride(2), LEVELS=count, MASKED=valid is not None,
        ROWS=rows, PADDED=padded,
    )  # fmt: skip
    return grad_level
