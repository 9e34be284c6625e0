"""Compute multi-scale deformable attention: weighted bilinear samples of several maps.

Backends, all equal in values and gradients: ``reference`` (the readable one, in stock gathers, so
that graphs for other programs can hold it), ``pytorch`` (``grid_sample``, level by level), ``bags``
(on CPUs: each query sums rows of the value, by ``embedding_bag``) and ``triton`` (on GPUs).
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .focal_block.policy import (
    _triton_unavailable,
    forced_backend,
    is_exporting,
    is_tracing,
    without_autocast,
)

# (height, width) of each level.
Shapes = Sequence[tuple[int, int]]
# Sums the samples of one level: (value, locations, weights, height, width) -> (N, Q, heads, D).
Level = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def deformable_attention(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, backend: str | None = None
) -> Tensor:
    """Sum bilinear samples of all levels, weighted, for each query and head.

    The pixel of a location is ``location * size - 0.5``; a corner outside its level counts as zero.
    Locations, weights and sums are float32 whatever autocast says: half precision loses pixels on
    maps wider than a hundred.

    Args:
        value: (N, S, heads, D); S are the cells of all levels, row by row, in float32, float64
            or half precision.
        shapes: (height, width) of each of the L levels; a level may be empty.
        locations: (N, Q, heads, L, points, 2: x, y), 0..1 inside a level, may lie outside.
        weights: (N, Q, heads, L, points).
        backend: None chooses by device and type.
    Returns: (N, Q, heads * D), in the type of ``value``. It can be differentiated once; by the
        reference and in compiled graphs, more often.
    Raises: ValueError if the shapes do not fit together, or for an unknown backend.
    Source: arXiv:2010.04159, equation 3.
    """
    shapes = [(int(height), int(width)) for height, width in shapes]
    _check(value, shapes, locations, weights)
    backend = backend or choose_backend(value)
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Known: {', '.join(BACKENDS)}.")
    with without_autocast(value):
        dtype = torch.promote_types(value.dtype, torch.float32)
        locations, weights = locations.to(dtype), weights.to(dtype)
        if backend == "triton":
            from .deformable.triton_deformable import triton_deformable_attention

            return triton_deformable_attention(value, shapes, locations, weights).flatten(2)
        # Half-precision values become float32 level by level.
        level = BACKENDS[backend]
        assert level is not None
        tensors = value, locations, weights
        recompute = backend != "reference" and not torch.compiler.is_compiling()
        if recompute and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            out = cast(Tensor, _LevelByLevel.apply(level, shapes, *tensors))
        else:
            out = _sum_levels(level, shapes, *tensors)
        return out.flatten(2).to(value.dtype)


def choose_backend(value: Tensor) -> str:
    """Return the backend for a value, by the variable that chooses those of blocks and by device.

    Raises: ValueError for an unknown order in the environment.
    """
    forced = forced_backend()
    if forced == "reference" or is_tracing() or is_exporting():
        return "reference"
    if torch._C._are_functorch_transforms_active():
        return "reference"
    wanted = forced == "triton" or (forced is None and value.device.type == "cuda")
    # The kernels add in no fixed order, and in float32.
    fits = value.dtype != torch.float64 and not torch.are_deterministic_algorithms_enabled()
    if wanted and fits and not _triton_unavailable(value.device):
        return "triton"
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        return "bags"
    return "pytorch"


def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    cells = sum(height * width for height, width in shapes)
    if value.dim() != 4 or value.shape[1] != cells:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; levels of sizes {list(shapes)} need "
            f"(N, {cells}, heads, channels)."
        )
    expected = (value.shape[0], value.shape[2], len(shapes), 2)
    if locations.dim() != 6 or (*locations.shape[::2][:1], *locations.shape[2:4], 2) != expected:
        raise ValueError(
            f"locations have shape {tuple(locations.shape)}; must be (N = {expected[0]}, queries, "
            f"heads = {expected[1]}, levels = {expected[2]}, points, 2)."
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; locations ask for "
            f"{tuple(locations.shape[:-1])}."
        )


def _sum_levels(
    level: Level, shapes: Shapes, value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Return the sum over levels, (N, Q, heads, D), in the type of ``weights``."""
    total = None
    for i, cells in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        if cells.shape[1] == 0:
            continue
        inputs = cells.to(weights.dtype), locations[:, :, :, i], weights[:, :, :, i]
        part = level(*inputs, *shapes[i])
        total = part if total is None else total + part
    if total is None:
        # Nothing to see; the graph goes on to all inputs.
        total = weights.sum((3, 4))[..., None] * value.new_zeros(value.shape[-1])
    return total


class _LevelByLevel(torch.autograd.Function):
    """Keep the inputs alone and recompute the samples of one level at a time.

    Autograd would keep the samples of all levels until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, level: Level, shapes: Shapes, *tensors: Tensor) -> Tensor:
        ctx.level, ctx.shapes = level, shapes
        ctx.save_for_backward(*tensors)
        return _sum_levels(level, shapes, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        value, locations, weights = ctx.saved_tensors
        grads = torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)
        start = 0
        for i, (height, width) in enumerate(ctx.shapes):
            cells = slice(start, start + height * width)
            start = cells.stop
            if height * width == 0:
                continue
            level = [value[:, cells].to(weights.dtype), locations[:, :, :, i], weights[:, :, :, i]]
            with torch.enable_grad():
                level = [x.detach().requires_grad_() for x in level]
                out = ctx.level(*level, height, width)
            by_value, by_locations, by_weights = torch.autograd.grad(out, level, grad_output)
            grads[0][:, cells] = by_value
            grads[1][:, :, :, i] = by_locations
            grads[2][:, :, :, i] = by_weights
        return None, None, *grads


def corners(locations: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Return the cells around each location and their bilinear weights.

    Args:
        locations: (..., 2: x, y), 0..1.
    Returns: four pairs of row-major cell numbers, int64, and weights, (...) each; a corner outside
        has the number of some cell inside, and weight zero.
    """
    # Beyond these limits all corners are outside, and numbers could overflow.
    x = (locations[..., 0] * width - 0.5).clamp(-2, width + 1)
    y = (locations[..., 1] * height - 0.5).clamp(-2, height + 1)
    left, top = x.detach().floor(), y.detach().floor()
    by_x = (left, 1 - (x - left)), (left + 1, x - left)
    by_y = (top, 1 - (y - top)), (top + 1, y - top)
    found = []
    for (row, by_row), (column, by_column) in product(by_y, by_x):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        cell = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
        found.append((cell, by_row * by_column * inside))
    return found


def _reference_level(
    value: Tensor, locations: Tensor, weights: Tensor, height: int, width: int
) -> Tensor:
    """Sum samples, bilinear interpolation written out; arguments as in `_grid_sample_level`."""
    value = value.transpose(1, 2)  # (N, heads, cells, D)
    samples: Any = 0
    for cell, weight in corners(locations.transpose(1, 2), height, width):
        index = cell.flatten(2)[..., None].expand(-1, -1, -1, value.shape[-1])
        samples = samples + value.gather(2, index).unflatten(2, cell.shape[2:]) * weight[..., None]
    # (N, heads, Q, points, D)
    return cast(Tensor, (samples * weights.transpose(1, 2)[..., None]).sum(3).transpose(1, 2))


def _grid_sample_level(
    value: Tensor, locations: Tensor, weights: Tensor, height: int, width: int
) -> Tensor:
    """Sum the samples of one level by ``grid_sample``.

    Args:
        value: (N, height * width, heads, D).
        locations: (N, Q, heads, points, 2).
        weights: (N, Q, heads, points).
    Returns: (N, Q, heads, D).
    """
    n, _, heads, channels = value.shape
    maps = value.permute(0, 2, 3, 1).reshape(n * heads, channels, height, width)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    samples = F.grid_sample(maps, grid, align_corners=False)  # (N * heads, D, Q, points)
    summed = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return summed.unflatten(0, (n, heads)).permute(0, 3, 1, 2)


def _bags_level(
    value: Tensor, locations: Tensor, weights: Tensor, height: int, width: int
) -> Tensor:
    """Sum rows of the value, corner by corner, without writing samples; arguments as above.

    A row is the D channels of a cell and a head, which lie together.
    """
    n, cells, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[3]
    if n * queries * heads * points == 0:
        return value.new_zeros(n, queries, heads, channels) + weights.sum(3, keepdim=True)
    dtype = torch.int32 if n * cells * heads < 2**31 else torch.int64
    image = torch.arange(n, dtype=dtype).view(n, 1, 1, 1) * (cells * heads)
    first = image + torch.arange(heads, dtype=dtype).view(1, 1, heads, 1)
    found = _flat_corners(locations, height, width, dtype)
    rows = torch.cat([cell.mul_(heads).add_(first) for cell, _ in found], dim=-1)
    factors = torch.cat([weight * weights for _, weight in found], dim=-1)
    shape = n * queries * heads, 4 * points
    out = _SumRows.apply(value.reshape(-1, channels), rows.view(shape), factors.view(shape))
    return cast(Tensor, out).view(n, queries, heads, channels)


class _SumRows(torch.autograd.Function):
    """Weighted sums of rows: (R, D), numbers (B, K) and weights (B, K) -> (B, D).

    The backward pass by the table sums rows of the gradient in the same way, in the order of the
    numbers. That of ``embedding_bag`` takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows, factors)
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, rows, factors = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_table = grad_factors = None
        if ctx.needs_input_grad[0]:
            ordered, order = rows.flatten().sort()
            numbers = torch.arange(len(table), dtype=rows.dtype, device=rows.device)
            grad_table = F.embedding_bag(
                torch.div(order, rows.shape[1], rounding_mode="floor").to(rows.dtype),
                grad_output,
                torch.searchsorted(ordered, numbers, out_int32=rows.dtype == torch.int32),
                mode="sum",
                per_sample_weights=factors.flatten()[order],
            )
        if ctx.needs_input_grad[2]:
            with torch.enable_grad():
                factors = factors.detach().requires_grad_()
                out = F.embedding_bag(rows, table.detach(), mode="sum", per_sample_weights=factors)
            grad_factors = torch.autograd.grad(out, factors, grad_output)[0]
        return grad_table, None, grad_factors


def _flat_corners(
    locations: Tensor, height: int, width: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Return what `corners` does, axis by axis: fewer passes over memory."""
    axes = []
    for axis, size in ((1, height), (0, width)):
        pixel = (locations[..., axis] * size - 0.5).clamp(-2, size + 1)
        low = pixel.detach().floor()
        fraction = pixel - low
        index = low.to(dtype)
        inside = (index >= 0) & (index < size), (index >= -1) & (index < size - 1)
        axes.append(
            (
                (index.clamp(0, size - 1), (1 - fraction) * inside[0]),
                ((index + 1).clamp(0, size - 1), fraction * inside[1]),
            )
        )
    return [
        (row * width + column, by_row * by_column)
        for (row, by_row), (column, by_column) in product(*axes)
    ]


# The Triton kernels go through all levels themselves.
BACKENDS: dict[str, Level | None] = {
    "reference": _reference_level,
    "pytorch": _grid_sample_level,
    "bags": _bags_level,
    "triton": None,
}
