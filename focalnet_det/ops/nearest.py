"""Compute focal attention, version 2: windows read the tokens closest to their centers."""

import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .focal_block.policy import assume_constant, without_autocast
from .window_attention import (
    GridBias,
    WindowGrid,
    WindowKeys,
    attend,
    is_recording_graph,
    token_index,
)

# Exceeds the sides of any map, and the number of its tokens.
UNREACHABLE = 2**20


@assume_constant
def _ranks(count: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs of ranks (row, column) that can be among the nearest ``count`` tokens.

    Rows and columns are ranked by distance, from 0. At least (row + 1) * (column + 1) tokens have a
    row and a column that are no further, and none of these comes later in the order of distance,
    then index.
    """
    return _pairs(count)


@functools.cache
def _pairs(count: int) -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a in range(count) for b in range(count // (a + 1)))


def _by_distance(centers: Tensor, limit: Tensor, count: int) -> Tensor:
    """Sort positions on an axis by distance to each center, then by position.

    Args:
        centers: (centers,), int64.
        limit: (...), length of the axis; positions beyond it come last.
        count: number of positions to return.
    Returns: (..., centers, count), int64.
    """
    closest = torch.minimum(centers, limit[..., None] - 1)[..., None]
    low = torch.zeros((), dtype=centers.dtype, device=centers.device)
    # A run of 2 * count positions around the center, shifted into the axis at its ends.
    start = torch.minimum(closest - count, limit[..., None, None] - 2 * count).maximum(low)
    run = start + torch.arange(2 * count, device=centers.device)
    distance = (run - centers[:, None]).abs() + UNREACHABLE * (run >= limit[..., None, None])
    order = torch.topk(distance * (2 * UNREACHABLE) + run, count, largest=False, sorted=True).values
    return order % (2 * UNREACHABLE)


def nearest(
    centers: tuple[Tensor, Tensor], limits: tuple[Tensor, Tensor], width: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the tokens closest to points of a map, by squared distance, then row-major index.

    Args:
        centers: rows (R,) and columns (C,) of a grid of points, tokens.
        limits: height and width of the map, (...), tokens.
        width: width of the map that indices refer to, tokens.
        count: number of tokens to find.
    Returns: rows, columns (int64) and existence (bool) of the tokens, (..., R * C, count) each.
    """
    ranks = torch.tensor(_ranks(count), device=centers[0].device)
    y = _by_distance(centers[0], limits[0], count)[..., ranks[:, 0]]  # (..., rows, pairs)
    x = _by_distance(centers[1], limits[1], count)[..., ranks[:, 1]]
    square_y, square_x = (y - centers[0][:, None]).square(), (x - centers[1][:, None]).square()
    distance = square_y[..., :, None, :] + square_x[..., None, :, :]
    outside = (y >= limits[0][..., None, None])[..., :, None, :] | (
        x >= limits[1][..., None, None]
    )[..., None, :, :]
    index = y[..., :, None, :] * width + x[..., None, :, :]
    order = torch.where(outside, UNREACHABLE * UNREACHABLE, distance) * UNREACHABLE + torch.where(
        outside, 0, index
    )
    order = order.flatten(-3, -2)
    chosen = torch.topk(order, count, dim=-1, largest=False, sorted=True).indices
    rows = y[..., :, None, :].expand(distance.shape).flatten(-3, -2).gather(-1, chosen)
    columns = x[..., None, :, :].expand(distance.shape).flatten(-3, -2).gather(-1, chosen)
    inside = ~outside.flatten(-3, -2).gather(-1, chosen)
    return rows, columns, inside


class NearestLayout(NamedTuple):
    """The keys of the windows of a map, and the layout of their bias tables.

    Attributes:
        keys: keys of both levels, tokens of the map first.
        bias: indices into the bias tables of both levels.
        offsets: for each level, the offsets (offsets, 2: rows, columns) of its table, tokens.
    """

    keys: WindowKeys
    bias: GridBias
    offsets: tuple[Tensor, Tensor]


class StoredSets:
    """Sets of keys that weights were trained with, for one map size; compared by identity.

    Args:
        size: map size that the sets are for.
        sets: (windows, K) each, indices as :func:`nearest_sets` returns them.
    """

    def __init__(self, size: WindowGrid, sets: tuple[Tensor, Tensor]) -> None:
        self.size = size
        self.sets = sets


# All blocks of a stage have equal sets: one object lets them share a cached layout.
_SHARED_SETS: weakref.WeakValueDictionary[tuple[WindowGrid, bytes, bytes], StoredSets] = (
    weakref.WeakValueDictionary()
)


def infer_map_size(sets: tuple[Tensor, Tensor], window: int, count: int) -> StoredSets | None:
    """Infer the map size that stored sets of closest tokens are for; None if there is none.

    Files do not state it: it is the size at which the closest tokens have the same distances.

    Args:
        sets: tokens and pooled tokens, (windows, K) each, as :func:`nearest_sets` returns them
            except for the choice among tokens at equal distances.
        window: side of a window, tokens.
        count: ``top_k`` of the network.
    """
    if any(t.ndim != 2 or t.is_floating_point() or t.is_meta for t in sets):
        return None
    tokens, windows = (t.detach().to("cpu", torch.int64).sort(dim=1).values for t in sets)
    total = len(tokens)
    for rows in (n for n in range(1, total + 1) if total % n == 0):
        size = WindowGrid(rows * window, total // rows * window, window)
        if all(
            _has_same_distances(given, level, expected, size)
            for level, (given, expected) in enumerate(
                zip((tokens, windows), nearest_sets(size, count), strict=True)
            )
        ):
            key = size, tokens.numpy().tobytes(), windows.numpy().tobytes()
            return _SHARED_SETS.setdefault(key, StoredSets(size, (tokens, windows)))
    return None


def _has_same_distances(given: Tensor, level: int, expected: Tensor, size: WindowGrid) -> bool:
    """Tell whether sets hold each index once and have the same distances as the expected sets."""
    height, width = (size.height, size.width) if level == 0 else (size.rows, size.columns)
    if given.shape != expected.shape or given.min() < 0 or given.max() >= height * width:
        return False
    if given.shape[1] > 1 and not (given[:, 1:] > given[:, :-1]).all():
        return False
    cpu = torch.device("cpu")
    y, x = centers(size, cpu) if level == 0 else _grid(size, cpu)
    points = torch.cartesian_prod(y, x)

    def distances(index: Tensor) -> Tensor:
        y, x = index // width - points[:, :1], index % width - points[:, 1:]
        return (y.square() + x.square()).sort(dim=1).values

    return torch.equal(distances(given), distances(expected))


def centers(size: WindowGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the centers of all windows, tokens."""
    rows, columns = _grid(size, device)
    middle = size.window // 2
    return rows * size.window + middle, columns * size.window + middle


def _grid(size: WindowGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns of windows."""
    return torch.arange(size.rows, device=device), torch.arange(size.columns, device=device)


def nearest_sets(size: WindowGrid, count: int) -> tuple[Tensor, Tensor]:
    """Return row-major indices of the tokens and pooled tokens closest to each window.

    Returns: (windows, K) each, int64; K is ``count``, or less on a smaller map.
    """
    cpu = torch.device("cpu")
    levels = (
        (centers(size, cpu), (size.height, size.width)),
        (_grid(size, cpu), (size.rows, size.columns)),
    )
    sets = []
    for points, limits in levels:
        sides = torch.tensor(limits[0], device=cpu), torch.tensor(limits[1], device=cpu)
        rows, columns, _ = nearest(points, sides, limits[1], count)
        sets.append((rows * limits[1] + columns)[:, : min(count, limits[0] * limits[1])])
    return sets[0], sets[1]


@functools.lru_cache(maxsize=64)
def _cached_layout(
    size: WindowGrid, count: int, stored: StoredSets | None, device: torch.device
) -> NearestLayout:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        sets = nearest_sets(size, count) if stored is None else stored.sets
        tokens, windows = sets
        layout = _build_layout(
            size,
            (tokens // size.width, tokens % size.width),
            (windows // size.columns, windows % size.columns),
            tight=True,
        )
        keys = WindowKeys(layout.keys.tokens.to(device))
        bias = GridBias(*(tuple(t.to(device) for t in level) for level in layout.bias))
        offsets = layout.offsets[0].to(device), layout.offsets[1].to(device)
        return NearestLayout(keys, bias, offsets)


def _build_layout(
    size: WindowGrid, tokens: tuple[Tensor, Tensor], windows: tuple[Tensor, Tensor], *, tight: bool
) -> NearestLayout:
    """Build the layout from rows and columns of the keys of both levels.

    Args:
        size: size of the map.
        tokens, windows: rows and columns, (windows, K) or (N, windows, K) each, in tokens and in
            windows.
        tight: bound the offsets in the tables by those that occur, rather than the sides of the
            map; a recorded graph cannot.
    """
    w, device = size.window, tokens[0].device
    index = token_index(*tokens, size)
    pooled = windows[0] * size.columns + windows[1] + size.windows * size.cells
    positions = tokens, (windows[0] * w + w // 2, windows[1] * w + w // 2)
    cells = _cells(size, device)
    sides = size.rows * w, size.columns * w
    levels = [_offsets(*cells, y, x, sides, tight) for y, x in positions]
    query, key, grids = zip(*levels, strict=True)
    return NearestLayout(
        WindowKeys(torch.cat((index, pooled), dim=-1)), GridBias(query, key), grids
    )


def _cells(size: WindowGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the cells of each window, (windows, cells) each."""
    w = size.window
    y = torch.arange(size.rows * w, device=device).reshape(size.rows, 1, w, 1)
    x = torch.arange(size.columns * w, device=device).reshape(1, size.columns, 1, w)
    shape = size.rows, size.columns, w, w
    return tuple(t.expand(shape).reshape(size.windows, size.cells) for t in (y, x))  # type: ignore[return-value]


def _offsets(
    query_y: Tensor, query_x: Tensor, y: Tensor, x: Tensor, sides: tuple[int, int], tight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table indices of one level (queries and keys), and the offsets of its table.

    Args:
        query_y, query_x: rows and columns of query cells, (windows, cells).
        y, x: rows and columns of keys, (windows, K) or (N, windows, K).
        sides: height and width of the padded map, tokens.
        tight: as in :func:`_build_layout`.
    """
    if tight:
        ends = []
        for query, key in ((query_y, y), (query_x, x)):
            low = int((query.amin(1) - key.amax(1)).min())
            ends.append((low, int((query.amax(1) - key.amin(1)).max()) + 1))
        (low_y, end_y), (low_x, end_x) = ends
    else:
        (low_y, end_y), (low_x, end_x) = ((1 - side, side) for side in sides)
    span = end_x - low_x
    rows = torch.arange(low_y, end_y, device=y.device)
    columns = torch.arange(low_x, end_x, device=y.device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return query_y * span + query_x, -((y + low_y) * span + x + low_x), grid


def _traceable_layout(
    size: WindowGrid, count: int, valid: Tensor | None, device: torch.device
) -> NearestLayout:
    """Build the layout with tensor operations only, for recorded graphs and padded batches."""
    if valid is None:
        sides = tuple(torch.ones(n, device=device).sum() for n in (size.height, size.width))
    else:
        sides = tuple(valid[:, 0].amax(dim).sum(1) for dim in (2, 1))
    height, width = (side.to(torch.int64) for side in sides)
    rows, columns = (
        (height + size.window - 1) // size.window,
        (width + size.window - 1) // size.window,
    )
    levels = (
        nearest(centers(size, device), (height, width), size.width, count),
        nearest(_grid(size, device), (rows, columns), size.columns, count),
    )
    # A missing token gets the index of the closest one, which exists; the mask excludes it.
    (y, x), (window_y, window_x) = (
        [torch.where(inside, t, t[..., :1]) for t in (rows, columns)]
        for rows, columns, inside in levels
    )
    layout = _build_layout(size, (y, x), (window_y, window_x), tight=False)
    inside = torch.cat([level[2] for level in levels], dim=-1)
    return layout._replace(keys=layout.keys._replace(inside=inside))


def nearest_attention(
    query: Tensor,
    maps: Tensor,
    levels: tuple["OffsetMlp", "OffsetMlp"],
    size: WindowGrid,
    *,
    heads: int,
    count: int,
    stored: StoredSets | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Attend as :func:`focalnet_det.ops.focal_attention.nearest_attention` does, but faster.

    Args:
        query: (N, windows, cells, C).
        maps: (N * tokens + N * windows, 2C); this, ``size``, ``heads`` and ``valid`` are as in
            :func:`.cyclic.cyclic_attention`; with ``valid``, keys are those of the same image.
        levels: biases by offset, for tokens and pooled tokens.
        count: number of tokens that a window reads of each level, if the map has as many.
        stored: sets to use instead of the closest tokens, on maps of their size.
    Returns: (N, windows, cells, C), in the dtype of ``query``.
    """
    if is_recording_graph() or valid is not None:
        layout = _traceable_layout(size, count, valid, query.device)
    else:
        fits = stored is not None and stored.size == size
        layout = _cached_layout(size, count, stored if fits else None, query.device)
    with without_autocast(query):
        tables = tuple(bias(offsets) for bias, offsets in zip(levels, layout.offsets, strict=True))
        return attend(query, maps, layout.keys, layout.bias, tables, heads)


class OffsetMlp(NamedTuple):
    """Two linear layers with a ReLU, from an offset in tokens to the bias of each head.

    Attributes:
        weight1: (hidden, 2).
        bias1: (hidden,).
        weight2: (heads, hidden).
        bias2: (heads,).
    """

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    def __call__(self, offsets: Tensor) -> Tensor:
        """Map (offsets, 2) to (heads, offsets), float32 or float64: offsets reach hundreds."""
        w1, b1, w2, b2 = (p if p.dtype == torch.float64 else p.float() for p in self)
        hidden = torch.nn.functional.linear(offsets.to(w1.dtype), w1, b1).relu()
        return w2 @ hidden.mT + b2[:, None]
