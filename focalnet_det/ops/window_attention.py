"""Focal attention as one gather of keys and one scaled dot-product attention per window.

Which tokens a window reads does not depend on the features: it is planned once per map size, as a
table of token numbers. In version 1 a token of the ring that the published code reads twice, with
biases b1 and b2, is read once with ``logaddexp(b1, b2)``, which is the same sum.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import exporting, traced, without_autocast
from .focal_attention import AttentionTables
from .window_layout import offset_index, ring

# Numbers in the largest intermediate of a step on CPUs, for their caches.
CHUNK = 2**20


class Keys(NamedTuple):
    """What the windows of a map read.

    Attributes:
        tokens: (windows, columns) or (N, windows, columns), numbers of the tokens read: those of
            the windows one after the other (:func:`token_numbers`), then the pooled ones.
        inside: (windows, columns) or (N, windows, columns), False where a column has no token;
            None where all have.
        order: (windows,), which windows the rows are; None for all in order.
        whole: the first rows, in which every column has its token.
    """

    tokens: Tensor
    inside: Tensor | None = None
    order: Tensor | None = None
    whole: int = 0


class Map(NamedTuple):
    """Size of a token map: its own, without the padding to whole windows."""

    height: int
    width: int
    window: int

    @property
    def rows(self) -> int:
        """Of windows."""
        return (self.height + self.window - 1) // self.window

    @property
    def columns(self) -> int:
        """Of windows."""
        return (self.width + self.window - 1) // self.window

    @property
    def windows(self) -> int:
        """Number of windows."""
        return self.rows * self.columns

    @property
    def cells(self) -> int:
        """Of a window."""
        return self.window * self.window


def token_numbers(y: Tensor, x: Tensor, size: Map) -> Tensor:
    """Numbers of the tokens at rows y and columns x, counted window by window."""
    w = size.window
    return (y // w * size.columns + x // w) * size.cells + y % w * w + x % w


def recording() -> bool:
    """Whether a graph is being recorded, which must not fix sizes or keep tensors."""
    return torch.compiler.is_compiling() or traced() or exporting()


def ring_is_read(size: Map) -> bool:
    """Whether windows read their neighbors: not on a map that one window spans.

    Source: the published blocks, built for maps of at most one window, have no neighbors.
    """
    return min(size.height, size.width) > size.window


def cyclic_keys(
    size: Map, expand: int, focal_window: int, device: torch.device, *, every_column: bool = False
) -> Keys:
    """Keys of version 1: the window, the cyclic ring around it, and pooled tokens.

    Args:
        size: of the map.
        expand: width of the ring; 0 leaves it out.
        focal_window: side of the square of pooled tokens.
        every_column: for recorded graphs: all windows in order, with the ring masked on small maps
            instead of left out.
    """
    w, rows, columns = size.window, size.rows, size.columns
    with_ring = expand > 0 and (every_column or ring_is_read(size))
    grid = torch.arange(w, device=device)
    own = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    offsets = torch.cat((own, _ring_offsets(w, expand, device))) if with_ring else own
    top, left = (torch.arange(n, device=device) * w for n in (rows, columns))
    y = (top[:, None] + offsets[:, 0]) % (rows * w)  # (rows, cells)
    x = (left[:, None] + offsets[:, 1]) % (columns * w)
    fine = token_numbers(y[:, None], x, size).flatten(0, 1)
    pooled, pooled_inside = _pooled_square(rows, columns, focal_window, device)
    tokens = torch.cat((fine, pooled + rows * columns * w * w), dim=1)
    fine_inside = torch.ones_like(fine, dtype=torch.bool)
    if with_ring and every_column:
        spans = [torch.ones(n, device=device).sum() > w for n in (size.height, size.width)]
        is_own = torch.arange(fine.shape[1], device=device) < w * w
        fine_inside = fine_inside & (is_own | (spans[0] & spans[1]))
    inside = torch.cat((fine_inside, pooled_inside), dim=1)
    if every_column:
        return Keys(tokens, inside)
    whole = inside.all(1)
    order = torch.argsort(whole.to(torch.uint8), descending=True, stable=True)
    return Keys(tokens[order], inside[order], order, int(whole.sum()))


def _ring_offsets(window: int, expand: int, device: torch.device) -> Tensor:
    return torch.tensor(ring(window, expand).offsets, device=device)


def _pooled_square(
    rows: int, columns: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Numbers of the pooled tokens around each window, (windows, size^2), and which exist."""
    reach = torch.arange(size, device=device) - size // 2
    y = torch.arange(rows, device=device)[:, None] + reach
    x = torch.arange(columns, device=device)[:, None] + reach
    inside_y, inside_x = (y >= 0) & (y < rows), (x >= 0) & (x < columns)
    inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
    number = y.clamp(min=0)[:, None, :, None] * columns + x.clamp(min=0)[None, :, None, :]
    number = torch.where(inside, number, torch.zeros_like(number))
    shape = (rows * columns, size * size)
    return number.reshape(shape), inside.reshape(shape)


@functools.lru_cache(maxsize=64)
def _planned(size: Map, expand: int, focal_window: int, device: torch.device) -> Keys:
    with torch.inference_mode(False), torch.no_grad():
        keys = cyclic_keys(size, expand, focal_window, torch.device("cpu"))
        return Keys(*[k.to(device) if isinstance(k, Tensor) else k for k in keys])


def cyclic_bias(tables: AttentionTables, window: int, focal_window: int, *, ring_read: bool,
                expand: int) -> Tensor:  # fmt: skip
    """(heads, window^2, columns), of the columns of :func:`cyclic_keys`, at least float32."""
    device = tables.own.device
    own = offset_index(window, window, window - 1, device)
    parts = [_wide(tables.own)[own.flatten()].unflatten(0, own.shape).permute(2, 0, 1)]
    if tables.neighbors is not None and not ring_read and torch.is_grad_enabled():
        # Gradients of zero instead of none, which DistributedDataParallel refuses.
        parts[0] = parts[0] + 0.0 * tables.neighbors.sum()
    if ring_read and tables.neighbors is not None:
        _, columns, second = ring(window, expand)
        table = _wide(tables.neighbors[0])
        once = table[:, :, torch.tensor(columns, device=device)]
        single = len(columns) - len(second)
        other = table[:, :, torch.tensor(second, dtype=torch.int64, device=device)]
        parts += [once[:, :, :single], torch.logaddexp(once[:, :, single:], other)]
    pooled = offset_index(window, focal_window, focal_window - 1, device)
    parts.append(_wide(tables.windows)[:, pooled.flatten()].unflatten(1, pooled.shape))
    return torch.cat(parts, dim=2)


def _wide(table: Tensor) -> Tensor:
    return table if table.dtype == torch.float64 else table.float()


def focal_attention(
    query: Tensor,
    maps: Tensor,
    tables: AttentionTables,
    size: Map,
    *,
    heads: int,
    expand: int,
    focal_window: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Version 1, equal to :func:`focalnet_det.ops.focal_attention.focal_attention`.

    Args:
        query: (N, windows, cells, C), of the map padded to whole windows.
        maps: (N * tokens + N * windows, 2C), keys and values of all maps, window by window, then
            of all pooled tokens.
        tables: position biases.
        size: of the map.
        heads, expand, focal_window: as in the reference.
        valid: (N, 1, H, W) of the map without padding: ones inside an image. Windows then read
            neither padding nor tokens across the border of the map.
    Returns: (N, windows, cells, C).
    """
    whole_graph = recording() or valid is not None
    if whole_graph:
        keys = cyclic_keys(size, expand, focal_window, query.device, every_column=True)
    else:
        keys = _planned(size, expand, focal_window, query.device)
    ring_read = expand > 0 and (whole_graph or ring_is_read(size))
    with without_autocast(query):
        bias = cyclic_bias(tables, size.window, focal_window, ring_read=ring_read, expand=expand)
        if valid is not None:
            keys = keys._replace(inside=_inside_images(keys, size, expand, valid))
        return attend(query, maps, keys, SharedBias(), (bias,), heads)


def _inside_images(keys: Keys, size: Map, expand: int, valid: Tensor) -> Tensor:
    """Which keys lie in their image and are not reached across the border, (N, windows, columns).

    An image of at most one window across has no neighbors, as a map of that size.
    """
    w, rows, columns = size.window, size.rows, size.columns
    real = F.pad(valid, (0, columns * w - size.width, 0, rows * w - size.height)) > 0
    real = real.reshape(-1, rows, w, columns, w).transpose(2, 3).flatten(3).flatten(1, 2)
    tokens = torch.cat((real.flatten(1), real.any(2)), dim=1)  # (N, tokens + windows)
    inside = tokens[:, keys.tokens] & _as_bool(keys.inside)
    if not expand:
        return inside
    offsets = _ring_offsets(w, expand, valid.device)
    top, left = (torch.arange(n, device=valid.device)[:, None] * w for n in (rows, columns))
    y, x = top + offsets[:, 0], left + offsets[:, 1]
    near_y, near_x = (y >= 0) & (y < rows * w), (x >= 0) & (x < columns * w)
    near = (near_y[:, None] & near_x).flatten(0, 1)  # (windows, ring)
    spans = [valid[:, 0].amax(dim).sum(1) > w for dim in (2, 1)]
    near = near & (spans[0] & spans[1])[:, None, None]
    own, end = w * w, w * w + offsets.shape[0]
    return torch.cat((inside[..., :own], inside[..., own:end] & near, inside[..., end:]), dim=-1)


def _as_bool(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask


class SharedBias:
    """One bias of all windows, (heads, cells, columns)."""

    def values(self, tables: Sequence[Tensor], _image: int, _windows: slice) -> Tensor:
        """(1, heads, cells, columns)."""
        return tables[0][None]

    def all_values(self, tables: Sequence[Tensor]) -> Tensor:
        """(1, heads, cells, columns)."""
        return tables[0][None]

    def add_gradient(
        self, sums: Sequence[Tensor], gradient: Tensor, _image: int, _windows: slice
    ) -> None:
        """Adds that of a chunk, (windows, heads, cells, columns), to the tables' gradients."""
        sums[0].add_(gradient.sum(0))


class GridBias(NamedTuple):
    """Biases looked up by the offset between query and key, in one table per level of keys.

    A table is (heads, offsets); the row of an offset is a number of the query plus one of the key.

    Attributes:
        query: of each level, (windows, cells).
        key: of each level, (windows, columns) or (N, windows, columns).
    """

    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]

    def _lookup(self, level: int, image: int, windows: slice) -> Tensor:
        key = self.key[level][image] if self.key[level].ndim == 3 else self.key[level]
        return self.query[level][windows][:, :, None] + key[windows][:, None]

    def values(self, tables: Sequence[Tensor], image: int, windows: slice) -> Tensor:
        """(windows, heads, cells, columns)."""
        parts = []
        for level, table in enumerate(tables):
            rows = self._lookup(level, image, windows)
            parts.append(table[:, rows.flatten()].unflatten(1, rows.shape))
        return torch.cat(parts, dim=-1).transpose(0, 1)

    def all_values(self, tables: Sequence[Tensor]) -> Tensor:
        """(windows, heads, cells, columns), with images before it if keys differ by image."""
        parts = []
        for query, key, table in zip(self.query, self.key, tables, strict=True):
            rows = query[:, :, None] + key[..., None, :]
            parts.append(table[:, rows.flatten()].unflatten(1, rows.shape).movedim(0, -3))
        return torch.cat(parts, dim=-1)

    def add_gradient(
        self, sums: Sequence[Tensor], gradient: Tensor, image: int, windows: slice
    ) -> None:
        """As in :class:`SharedBias`."""
        lengths = [key.shape[-1] for key in self.key]
        for level, part in enumerate(gradient.split(lengths, dim=-1)):
            rows = self._lookup(level, image, windows).flatten()
            sums[level].index_add_(1, rows, part.transpose(0, 1).flatten(1).to(sums[level].dtype))


Bias = SharedBias | GridBias


def attend(
    query: Tensor, maps: Tensor, keys: Keys, bias: Bias, tables: tuple[Tensor, ...], heads: int
) -> Tensor:
    """Scaled dot-product attention of every window to its own keys.

    Args:
        query, maps: as in :func:`focal_attention`.
        keys: of all windows.
        bias: how ``tables`` give the biases.
        tables: at least float32.
    Returns: (N, windows, cells, C), in the type of ``query``.
    """
    if recording() or torch._C._are_functorch_transforms_active():
        return _attend_at_once(query, maps, keys, bias, tables, heads)
    result: Tensor = _Attention.apply(query, maps, keys, bias, heads, *tables)
    return result


def _attend_at_once(
    query: Tensor, maps: Tensor, keys: Keys, bias: Bias, tables: tuple[Tensor, ...], heads: int
) -> Tensor:
    """In stock operators, for recorded graphs."""
    n, windows, cells, channels = query.shape
    fine, pooled = maps.split((n * windows * cells, n * windows))
    joined = torch.cat((fine.reshape(n, -1, 2 * channels), pooled.reshape(n, -1, 2 * channels)), 1)
    if keys.tokens.ndim == 3:
        columns = joined[torch.arange(n, device=query.device)[:, None, None], keys.tokens]
    else:
        columns = joined[:, keys.tokens]
    k, v = columns.chunk(2, dim=-1)
    q = query if keys.order is None else query[:, keys.order]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (q, k, v))
    added = _masked(bias.all_values(tables), keys.inside)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added.to(q.dtype))
    out = out.transpose(2, 3).flatten(3)
    return out if keys.order is None else out[:, torch.argsort(keys.order)]


def _masked(bias: Tensor, inside: Tensor | None) -> Tensor:
    """Adds a large negative number where there is no key.

    It is finite, so that rows without any key stay finite, in float16 too, which ends at 65504.
    """
    if inside is None:
        return bias
    zero = torch.zeros((), dtype=bias.dtype, device=bias.device)
    return bias + torch.where(inside, zero, zero - 30000.0)[..., None, None, :]


class _Attention(torch.autograd.Function):
    """Attention, some windows at a time; keeps projected maps alone for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, maps: Tensor, keys: Keys, bias: Bias, heads: int, *tables: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, maps, *tables)
        ctx.layout = keys, bias, heads
        out = torch.empty_like(query)
        for image, rows in _chunks(query, keys, heads):
            q, k, v, _ = _gather(query, maps, keys, heads, image, rows)
            added = _added(bias, tables, keys, image, rows).to(q.dtype)
            added = added.expand(len(q), -1, -1, -1)
            part = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
            _put(out[image], keys, rows, part.transpose(1, 2).flatten(2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, maps, *tables = ctx.saved_tensors
        keys, bias, heads = ctx.layout
        grad_query, grad_maps = torch.empty_like(query), torch.zeros_like(maps)
        sums = [torch.zeros_like(table) for table in tables]
        for image, rows in _chunks(query, keys, heads):
            q, k, v, tokens = _gather(query, maps, keys, heads, image, rows)
            g = _heads(_rows(gradient[image], keys, rows), heads)
            scale = q.shape[-1] ** -0.5
            logits = (q @ k.mT).to(tables[0].dtype) * scale
            p = (logits + _added(bias, tables, keys, image, rows)).softmax(-1)
            grad_v = p.to(q.dtype).mT @ g
            grad_p = (g @ v.mT).to(p.dtype)
            grad_logits = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            bias.add_gradient(sums, grad_logits, image, rows)
            grad_logits = (grad_logits * scale).to(q.dtype)
            _put(grad_query[image], keys, rows, (grad_logits @ k).transpose(1, 2).flatten(2))
            grad_kv = torch.stack((grad_logits.mT @ q, grad_v), dim=1)
            # (windows, 2, heads, columns, d) to rows of the maps.
            grad_kv = grad_kv.permute(0, 3, 1, 2, 4).reshape(len(tokens), -1)
            grad_maps.index_add_(0, tokens, grad_kv)
        return grad_query, grad_maps, None, None, None, *sums


def _chunks(query: Tensor, keys: Keys, heads: int) -> list[tuple[int, slice]]:
    """Images and rows of windows of each step; rows that need a mask are apart from others."""
    _, windows, cells, _ = query.shape
    step = windows
    if query.device.type == "cpu":
        step = max(1, CHUNK // (cells * keys.tokens.shape[-1] * heads))
    borders = [0, keys.whole, windows] if keys.inside is not None else [0, windows]
    parts = [
        slice(first, min(first + step, end))
        for begin, end in itertools.pairwise(borders)
        for first in range(begin, end, step)
    ]
    return [(image, part) for image in range(len(query)) for part in parts]


def _rows(x: Tensor, keys: Keys, rows: slice) -> Tensor:
    """Some windows of (windows, cells, C)."""
    return x[rows] if keys.order is None else x.index_select(0, keys.order[rows])


def _put(x: Tensor, keys: Keys, rows: slice, part: Tensor) -> None:
    """Writes what :func:`_rows` reads."""
    if keys.order is None:
        x[rows] = part
    else:
        x.index_copy_(0, keys.order[rows], part)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(windows, cells, C) -> (windows, heads, cells, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _gather(
    query: Tensor, maps: Tensor, keys: Keys, heads: int, image: int, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values (windows, heads, ., d) of a chunk, and the rows of its tokens."""
    n, windows, cells, _ = query.shape
    tokens = keys.tokens[image][rows] if keys.tokens.ndim == 3 else keys.tokens[rows]
    if n > 1:
        count = windows * cells
        pooled = tokens >= count
        tokens = tokens + image * count + pooled * ((n - 1 - image) * count + image * windows)
    kv = maps.index_select(0, tokens.flatten())
    kv = kv.reshape(*tokens.shape, 2, heads, -1).permute(2, 0, 3, 1, 4)
    return _heads(_rows(query[image], keys, rows), heads), kv[0], kv[1], tokens.flatten()


def _added(bias: Bias, tables: Sequence[Tensor], keys: Keys, image: int, rows: slice) -> Tensor:
    """Biases and mask of a chunk, (windows or 1, heads, cells, columns)."""
    values = bias.values(tables, image, rows)
    if keys.inside is None or rows.stop <= keys.whole:
        return values
    inside = keys.inside[image] if keys.inside.ndim == 3 else keys.inside
    return _masked(values, inside[rows])
