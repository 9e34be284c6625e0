"""Compute gradients by the results of linear layers on GPUs, and their sums over pixels.

Whatever computes such a gradient has it in registers already; a sum of its own would read the map
once more. Sums are made in parts, which are then added in order: a run repeats bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import divide, gelu, gelu_slope
from .triton_launch import ceil_divide, kernel

_ROWS, _COLUMNS = 16, 128


@triton.jit
def _place(step, steps, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows and columns of one of the tiles of a program, and which of both there are."""
    row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < C)[None, :]


@triton.jit
def _store_sums(sums, total, C: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + tl.program_id(0) * C + column, tl.sum(total, axis=0), mask=column < C)


@kernel()
def scale_kernel(
    gradient, factors, out, sums, steps, rows, pixels,
    SCALED: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Convert to another type, times the factor of each image."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(steps):
        row, column, mask = _place(step, steps, rows, C, ROWS, COLUMNS)
        value = tl.load(gradient + row * C + column, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            image = row.to(tl.int32) // pixels
            value *= tl.load(factors + image, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + row * C + column, value, mask=mask)
        total += value
    _store_sums(sums, total, C, COLUMNS)


@kernel()
def gelu_backward_kernel(
    hidden, gradient, activation, grad_hidden, sums, steps, rows,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute GELU once more and its gradient, in one pass."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(steps):
        row, column, mask = _place(step, steps, rows, C, ROWS, COLUMNS)
        place = row * C + column
        value = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
        outer = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        outer *= gelu_slope(value)
        tl.store(activation + place, gelu(value), mask=mask)
        tl.store(grad_hidden + place, outer, mask=mask)
        total += outer
    _store_sums(sums, total, C, COLUMNS)


@kernel()
def product_backward_kernel(
    query, modulator, gradient, product, grad_query, grad_modulator, sums, steps, rows,
    AGAIN: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute both gradients of ``query * modulator`` and, ``AGAIN``, the product itself."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(steps):
        row, column, mask = _place(step, steps, rows, C, ROWS, COLUMNS)
        place, wide = row * C + column, row * STRIDE + column
        outer = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        left = tl.load(query + wide, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(modulator + place, mask=mask, other=0.0).to(tl.float32)
        if AGAIN:
            tl.store(product + place, left * right, mask=mask)
        tl.store(grad_query + wide, outer * right, mask=mask)
        tl.store(grad_modulator + place, outer * left, mask=mask)
        total += outer * left
    _store_sums(sums, total, C, COLUMNS)


@kernel()
def gated_sum_kernel(
    x, gates, sums, gate, factor, steps, pixels,
    C: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over a part of an image, each pixel times its gate."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    first = tl.program_id(2).to(tl.int64) * pixels
    x, gates = x + first * C, gates + first * STRIDE + gate
    for step in range(steps):
        row, column, mask = _place(step, steps, pixels, C, ROWS, COLUMNS)
        weight = tl.load(gates + row * STRIDE, mask=row < pixels, other=0.0).to(tl.float32)
        value = tl.load(x + row * C + column, mask=mask, other=0.0).to(tl.float32)
        total += value * (weight * factor)
    sums += tl.program_id(2) * tl.num_programs(0) * C
    _store_sums(sums, total, C, COLUMNS)


def scale(gradient: Tensor, factors: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradient by a branch from that by its sum with the input.

    Args:
        gradient: (N, H, W, C), contiguous.
        factors: of the images, (N, 1, 1, 1), None for 1.
        dtype: of the result.
    Returns: (N, H, W, C), and its sums over the pixels, (C,), float32.
    """
    _, h, w, c = gradient.shape
    grid, steps, sums = _parts(gradient)
    out = torch.empty_like(gradient, dtype=dtype)
    scale_kernel(
        grid,
        gradient, gradient if factors is None else factors.contiguous(), out, sums, steps,
        gradient.numel() // c, h * w, SCALED=factors is not None,
        C=c, ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out, sums.sum(0)


def gelu_backward(hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the GELU of ``hidden``, the gradient by it, and the sums of that over pixels.

    Args:
        hidden: (..., C), contiguous, before its GELU.
        gradient: the same shape, contiguous, after it.
    """
    activation, grad_hidden = torch.empty_like(hidden), torch.empty_like(hidden)
    grid, steps, sums = _parts(hidden)
    gelu_backward_kernel(
        grid,
        hidden, gradient, activation, grad_hidden, sums, steps, hidden.numel() // hidden.shape[-1],
        C=hidden.shape[-1], ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return activation, grad_hidden, sums.sum(0)


def product_backward(
    projected: Tensor, modulator: Tensor, gradient: Tensor, grad_projected: Tensor, *, again: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of query times modulator.

    Args:
        projected: (N, H, W, columns), the query in the first C columns.
        modulator, gradient: (N, H, W, C), contiguous.
        grad_projected: like ``projected``, gets the gradient by the query in its first C columns.
        again: whether the product is wanted too.
    Returns: the product or None, the gradient by the modulator, and its sums over the pixels.
    """
    c = modulator.shape[-1]
    product = torch.empty_like(modulator) if again else None
    grad_modulator = torch.empty_like(modulator)
    grid, steps, sums = _parts(modulator)
    product_backward_kernel(
        grid,
        projected, modulator, gradient, grad_modulator if product is None else product,
        grad_projected, grad_modulator, sums, steps, modulator.numel() // c,
        AGAIN=again, C=c, STRIDE=projected.stride(2), ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return product, grad_modulator, sums.sum(0)


def gated_sum(x: Tensor, projected: Tensor, gate: int, divisor: float) -> Tensor:
    """Sum over the pixels of each image, times their gate in a column of the projection.

    Args:
        x: (N, H, W, C), contiguous.
        projected: (N, H, W, columns).
        gate, divisor: column of the gate, and what it is divided by.
    Returns: (N, C), float32.
    """
    n, h, w, c = x.shape
    # As many programs in all as for other sums.
    steps, parts = divide(h * w, _ROWS, n)
    sums = x.new_empty(n, parts, c, dtype=torch.float32)
    gated_sum_kernel(
        (parts, ceil_divide(c, _COLUMNS), n),
        x, projected, sums, gate, 1 / divisor, steps, h * w,
        C=c, STRIDE=projected.stride(2), ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return sums.sum(1)


def _parts(x: Tensor) -> tuple[tuple[int, int], int, Tensor]:
    """Return programs, tiles of each, and where their sums go."""
    c = x.shape[-1]
    steps, parts = divide(x.numel() // c, _ROWS)
    return (parts, ceil_divide(c, _COLUMNS)), steps, x.new_empty(parts, c, dtype=torch.float32)
