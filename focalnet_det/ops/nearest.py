"""Keys of focal attention, version 2: the tokens closest to the center of each window."""

import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import constant, without_autocast
from .window_attention import GridBias, Keys, Map, attend, recording, token_numbers

# More than any side and, as a number of tokens, than any map has.
FAR = 2**20


@constant
def _ranks(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs of ranks (row, column) by distance, from 0, that can be among the nearest ``count``.

    The tokens whose row and column are no further are at least (row + 1) * (column + 1), and none
    of them comes later by distance and then number.
    """
    return _pairs(count)


@functools.cache
def _pairs(count: int) -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a in range(count) for b in range(count // (a + 1)))


def _by_distance(centers: Tensor, limit: Tensor, count: int) -> Tensor:
    """Positions on an axis by distance to each center, then position; (..., centers, count).

    Args:
        centers: (centers,).
        limit: (...), number of positions; those beyond come last.
    """
    closest = torch.minimum(centers, limit[..., None] - 1)[..., None]
    low = torch.zeros((), dtype=centers.dtype, device=centers.device)
    # A run of 2 * count around the center, moved into the axis where it would leave it.
    start = torch.minimum(closest - count, limit[..., None, None] - 2 * count).maximum(low)
    run = start + torch.arange(2 * count, device=centers.device)
    distance = (run - centers[:, None]).abs() + FAR * (run >= limit[..., None, None])
    order = torch.topk(distance * (2 * FAR) + run, count, largest=False, sorted=True).values
    return order % (2 * FAR)


def nearest(
    centers: tuple[Tensor, Tensor], limits: tuple[Tensor, Tensor], width: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens closest to points of a map: by squared distance, then row-major number.

    Args:
        centers: rows and columns of a grid of points, in tokens.
        limits: rows and columns of the map, (...).
        width: of the map that numbers count, tokens.
        count: how many.
    Returns: rows and columns of the tokens, and which there are, (..., points, count) each.
    """
    ranks = torch.tensor(_ranks(count), device=centers[0].device)
    y = _by_distance(centers[0], limits[0], count)[..., ranks[:, 0]]  # (..., rows, pairs)
    x = _by_distance(centers[1], limits[1], count)[..., ranks[:, 1]]
    square_y, square_x = (y - centers[0][:, None]).square(), (x - centers[1][:, None]).square()
    distance = square_y[..., :, None, :] + square_x[..., None, :, :]
    outside = (y >= limits[0][..., None, None])[..., :, None, :] | (
        x >= limits[1][..., None, None]
    )[..., None, :, :]
    number = y[..., :, None, :] * width + x[..., None, :, :]
    order = torch.where(outside, FAR * FAR, distance) * FAR + torch.where(outside, 0, number)
    order = order.flatten(-3, -2)
    chosen = torch.topk(order, count, dim=-1, largest=False, sorted=True).indices
    rows = y[..., :, None, :].expand(distance.shape).flatten(-3, -2).gather(-1, chosen)
    columns = x[..., None, :, :].expand(distance.shape).flatten(-3, -2).gather(-1, chosen)
    inside = ~outside.flatten(-3, -2).gather(-1, chosen)
    return rows, columns, inside


class Nearest(NamedTuple):
    """What the windows of a map read, and where the offsets to it stand in tables of biases.

    Attributes:
        keys: of both levels, tokens of the map first.
        bias: places in the tables of both levels.
        offsets: of each level, the offsets (offsets, 2: rows, columns) that its table holds.
    """

    keys: Keys
    bias: GridBias
    offsets: tuple[Tensor, Tensor]


class StoredSets:
    """Sets of keys that weights were trained with, for one size of map; compared by identity."""

    def __init__(self, size: Map, sets: tuple[Tensor, Tensor]) -> None:
        self.size = size
        self.sets = sets


# All blocks of a stage have the same sets, and so share a plan.
_KNOWN: weakref.WeakValueDictionary[tuple[Map, bytes, bytes], StoredSets] = (
    weakref.WeakValueDictionary()
)


def recognize(sets: tuple[Tensor, Tensor], window: int, count: int) -> StoredSets | None:
    """The size of map that sets of closest tokens are for; None if they are for none.

    Files do not name it: it is the one whose windows have the closest tokens as far away.

    Args:
        sets: of tokens and of pooled tokens, (windows, K) each, as :func:`nearest_sets` gives them
            but for the choice among tokens equally far away.
        window, count: of the network.
    """
    if any(t.ndim != 2 or t.is_floating_point() or t.is_meta for t in sets):
        return None
    tokens, windows = (t.detach().to("cpu", torch.int64).sort(dim=1).values for t in sets)
    total = len(tokens)
    for rows in (n for n in range(1, total + 1) if total % n == 0):
        size = Map(rows * window, total // rows * window, window)
        if all(
            _as_far(given, level, expected, size)
            for level, (given, expected) in enumerate(
                zip((tokens, windows), nearest_sets(size, count), strict=True)
            )
        ):
            key = size, tokens.numpy().tobytes(), windows.numpy().tobytes()
            return _KNOWN.setdefault(key, StoredSets(size, (tokens, windows)))
    return None


def _as_far(given: Tensor, level: int, expected: Tensor, size: Map) -> bool:
    """Whether sets hold each number once and have the distances of others."""
    height, width = (size.height, size.width) if level == 0 else (size.rows, size.columns)
    if given.shape != expected.shape or given.min() < 0 or given.max() >= height * width:
        return False
    if given.shape[1] > 1 and not (given[:, 1:] > given[:, :-1]).all():
        return False
    cpu = torch.device("cpu")
    y, x = centers(size, cpu) if level == 0 else _grid(size, cpu)
    points = torch.cartesian_prod(y, x)

    def distances(numbers: Tensor) -> Tensor:
        far = (numbers // width - points[:, :1]).square() + (
            numbers % width - points[:, 1:]
        ).square()
        return far.sort(dim=1).values

    return torch.equal(distances(given), distances(expected))


def centers(size: Map, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the centers of all windows, tokens."""
    rows, columns = _grid(size, device)
    middle = size.window // 2
    return rows * size.window + middle, columns * size.window + middle


def _grid(size: Map, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of windows."""
    return torch.arange(size.rows, device=device), torch.arange(size.columns, device=device)


def nearest_sets(size: Map, count: int) -> tuple[Tensor, Tensor]:
    """Row-major numbers of the tokens and the pooled tokens closest to each window, (windows, K).

    K is ``count``, or as many as there are.
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
def _planned(size: Map, count: int, stored: StoredSets | None, device: torch.device) -> Nearest:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        sets = nearest_sets(size, count) if stored is None else stored.sets
        tokens, windows = sets
        plan = _arranged(
            size,
            (tokens // size.width, tokens % size.width),
            (windows // size.columns, windows % size.columns),
            tight=True,
        )
        keys = Keys(plan.keys.tokens.to(device))
        bias = GridBias(*(tuple(t.to(device) for t in level) for level in plan.bias))
        return Nearest(keys, bias, (plan.offsets[0].to(device), plan.offsets[1].to(device)))


def _arranged(
    size: Map, tokens: tuple[Tensor, Tensor], windows: tuple[Tensor, Tensor], *, tight: bool
) -> Nearest:
    """Numbers of tokens and places of offsets, from rows and columns of both levels' keys.

    ``tight`` bounds the offsets by those that occur instead of the sides of the map.
    """
    w, device = size.window, tokens[0].device
    number = token_numbers(*tokens, size)
    pooled = windows[0] * size.columns + windows[1] + size.windows * size.cells
    places = tokens, (windows[0] * w + w // 2, windows[1] * w + w // 2)
    cells = _cells(size, device)
    sides = size.rows * w, size.columns * w
    levels = [_offsets(*cells, y, x, sides, tight) for y, x in places]
    query, key, grids = zip(*levels, strict=True)
    return Nearest(Keys(torch.cat((number, pooled), dim=-1)), GridBias(query, key), grids)


def _cells(size: Map, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the cells of each window, (windows, cells) each."""
    w = size.window
    y = torch.arange(size.rows * w, device=device).reshape(size.rows, 1, w, 1)
    x = torch.arange(size.columns * w, device=device).reshape(1, size.columns, 1, w)
    shape = size.rows, size.columns, w, w
    return tuple(t.expand(shape).reshape(size.windows, size.cells) for t in (y, x))  # type: ignore[return-value]


def _offsets(
    query_y: Tensor, query_x: Tensor, y: Tensor, x: Tensor, sides: tuple[int, int], tight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of one level in its table (queries and keys), and the offsets that it holds."""
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


def _found(size: Map, count: int, valid: Tensor | None, device: torch.device) -> Nearest:
    """The plan in tensor operations alone, for recorded graphs and for images in a batch."""
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
    # What is not there stands for the closest, so that its number exists.
    places = [[torch.where(inside, t, t[..., :1]) for t in (y, x)] for y, x, inside in levels]
    plan = _arranged(size, (places[0][0], places[0][1]), (places[1][0], places[1][1]), tight=False)
    inside = torch.cat([level[2] for level in levels], dim=-1)
    return plan._replace(keys=plan.keys._replace(inside=inside))


def nearest_attention(
    query: Tensor,
    maps: Tensor,
    levels: tuple["OffsetMlp", "OffsetMlp"],
    size: Map,
    *,
    heads: int,
    count: int,
    stored: StoredSets | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Version 2, equal to :func:`focalnet_det.ops.focal_attention.nearest_attention`.

    Args:
        query, maps, size, heads: as in :func:`.cyclic.cyclic_attention`.
        levels: biases by offset, for tokens and pooled tokens.
        count: tokens read of each level, or as many as there are.
        stored: sets to use on their size of map instead of the closest tokens.
        valid: as in :func:`.cyclic.cyclic_attention`: keys are of the own image.
    Returns: (N, windows, cells, C).
    """
    if recording() or valid is not None:
        plan = _found(size, count, valid, query.device)
    else:
        fits = stored is not None and stored.size == size
        plan = _planned(size, count, stored if fits else None, query.device)
    with without_autocast(query):
        tables = tuple(bias(offsets) for bias, offsets in zip(levels, plan.offsets, strict=True))
        return attend(query, maps, plan.keys, plan.bias, tables, heads)


class OffsetMlp(NamedTuple):
    """Two linear layers with a ReLU, from an offset in tokens to the bias of each head."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    def __call__(self, offsets: Tensor) -> Tensor:
        """(offsets, 2) -> (heads, offsets), at least float32: offsets reach hundreds."""
        w1, b1, w2, b2 = (p if p.dtype == torch.float64 else p.float() for p in self)
        hidden = torch.nn.functional.linear(offsets.to(w1.dtype), w1, b1).relu()
        return w2 @ hidden.mT + b2[:, None]
