"""Run linear layers of 16-bit maps with what follows them: inference.

A product of cuBLAS writes a map that the next kernel reads again. Where memory is what takes the
time, at few channels or with a wide result, a product in Triton that does the rest before it
writes is the faster one; where arithmetic takes it, cuBLAS is. Both are timed once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..weights import Affine
from . import triton_pointwise
from .triton_common import gelu, has_tensor_cores
from .triton_launch import ceil_divide, fastest, kernel

aten = torch.ops.aten

_TILES = [
    ({"ROWS": 128, "COLUMNS": 128}, 8),
    ({"ROWS": 64, "COLUMNS": 128}, 4),
    ({"ROWS": 128, "COLUMNS": 64}, 4),
]


@triton.jit
def _product(
    x, weight, bias, rows, K: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the layer; return it with its rows and columns."""
    blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    there, inside = (row < rows)[:, None], (column < N)[None, :]
    x += row.to(tl.int64)[:, None] * K
    weight += column[None, :] * K
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, K, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        left = tl.load(x + depth[None, :], mask=there & (depth < K)[None, :], other=0.0)
        right = tl.load(weight + depth[:, None], mask=(depth < K)[:, None] & inside, other=0.0)
        sums = tl.dot(left, right, sums)
    sums += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return sums, row, column


@kernel(*_TILES, key=["K", "N"])
def gelu_kernel(
    x, weight, bias, out, rows, K: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute ``gelu(layer(x))``."""
    sums, row, column = _product(x, weight, bias, rows, K, N, ROWS, COLUMNS, DEPTH)
    mask = (row < rows)[:, None] & (column < N)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], gelu(sums), mask=mask)


@kernel(*_TILES, key=["K", "N", "SCALED"])
def add_kernel(
    x, weight, bias, before, gamma, out, rows, SCALED: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute ``before + gamma * layer(x)``."""
    sums, row, column = _product(x, weight, bias, rows, K, N, ROWS, COLUMNS, DEPTH)
    mask = (row < rows)[:, None] & (column < N)[None, :]
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    if SCALED:
        sums *= tl.load(gamma + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    sums += tl.load(before + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, sums, mask=mask)


@kernel(*_TILES, key=["K", "N"])
def modulate_kernel(
    x, weight, bias, query, shared, out, gate, scale, pixels, rows,
    K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute ``query * (layer(x) + gate * shared)``; gates are columns of ``query``."""
    sums, row, column = _product(x, weight, bias, rows, K, N, ROWS, COLUMNS, DEPTH)
    there, inside = row < rows, (column < N)[None, :]
    mask = there[:, None] & inside
    wide = row.to(tl.int64) * STRIDE
    weights = tl.load(query + wide + gate, mask=there, other=0.0).to(tl.float32) * scale
    image = (row // pixels)[:, None] * N + column[None, :]
    sums += weights[:, None] * tl.load(shared + image, mask=mask, other=0.0).to(tl.float32)
    place = wide[:, None] + column[None, :]
    sums *= tl.load(query + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], sums, mask=mask)


def gelu_of(x: Tensor, layer: Affine) -> Tensor:
    """Return the GELU of a linear layer: (N, H, W, C) -> (N, H, W, columns)."""

    def separate() -> Tensor:
        hidden = F.linear(x, layer.weight, layer.bias)
        return aten.gelu.out(hidden, out=hidden)

    def fused() -> Tensor:
        out = x.new_empty(*x.shape[:-1], len(layer.weight))
        rows = x.numel() // x.shape[-1]
        gelu_kernel(_grid(x, layer), x, *layer[:2], out, rows, **_depth(layer))
        return out

    return _either("gelu", x, layer, fused, separate)


def add(before: Tensor, x: Tensor, layer: Affine, gamma: Tensor | None) -> Tensor:
    """Compute ``before + gamma * layer(x)``, in the type of ``before``, (N, H, W, C)."""

    def separate() -> Tensor:
        return scaled_sum(before, F.linear(x, layer.weight, layer.bias), gamma)

    def fused() -> Tensor:
        out = torch.empty_like(before)
        add_kernel(
            _grid(x, layer),
            x, *layer[:2], before, layer.bias if gamma is None else gamma, out,
            x.numel() // x.shape[-1], SCALED=gamma is not None, **_depth(layer),
        )  # fmt: skip
        return out

    return _either(f"add {before.dtype}", x, layer, fused, separate)


def scaled_sum(x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
    """Return ``x + gamma * branch``, in the type of ``x`` even where the branch has a wider one."""
    return (x + branch if gamma is None else torch.addcmul(x, branch, gamma)).to(x.dtype)


def modulate(
    local: Tensor, layer: Affine, projected: Tensor, shared: Tensor, gate: int, divisor: float
) -> Tensor:
    """Return query times modulator.

    Args:
        local: (N, H, W, C), gated sum of the levels.
        layer: ``h``.
        projected: (N, H, W, columns): the query in the first C columns, the gate of the global
            context in column ``gate``.
        shared: (N, C), ``h`` of the global context, without its bias.
        gate, divisor: of the global context's gate.
    Returns: (N, H, W, C).
    """

    def separate() -> Tensor:
        modulator = F.linear(local, layer.weight)
        return triton_pointwise.product(projected, modulator, layer.bias, shared, gate, divisor)

    def fused() -> Tensor:
        n, h, w, _ = local.shape
        out = local.new_empty(n, h, w, len(layer.weight))
        modulate_kernel(
            _grid(local, layer),
            local, *layer[:2], projected, shared, out, gate, 1 / divisor, h * w, n * h * w,
            STRIDE=projected.stride(2), **_depth(layer),
        )  # fmt: skip
        return out

    return _either("modulate", local, layer, fused, separate)


def _grid(x: Tensor, layer: Affine):
    rows, columns = x.numel() // x.shape[-1], len(layer.weight)
    return lambda meta: (ceil_divide(rows, meta["ROWS"]) * ceil_divide(columns, meta["COLUMNS"]),)


def _depth(layer: Affine) -> dict[str, int]:
    columns, depth = layer.weight.shape
    return {"K": depth, "N": columns, "DEPTH": 64 if depth % 64 == 0 else 32}


def _either(name, x, layer, fused, separate):
    if not has_tensor_cores(x.dtype):
        return separate()
    return fastest(x, (name, x.dtype, *layer.weight.shape), fused, separate)
