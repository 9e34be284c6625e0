"""Attention of windows to tokens that tables name: one gather and one product per window.

Which tokens a window reads does not depend on the features: it is planned once per map size.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import exporting, traced

# Numbers in the largest intermediate of a step on CPUs, for their caches.
CHUNK = 2**18


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


def looked_up(table: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Entries of a table along a dimension, which becomes those of ``rows``."""
    return table.index_select(dim, rows.flatten()).unflatten(dim, rows.shape)


def recording() -> bool:
    """Whether a graph is being recorded, which must not fix sizes or keep tensors."""
    return torch.compiler.is_compiling() or traced() or exporting()


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
            parts.append(looked_up(table, 1, rows))
        return torch.cat(parts, dim=-1).transpose(0, 1)

    def all_values(self, tables: Sequence[Tensor]) -> Tensor:
        """(windows, heads, cells, columns), with images before it if keys differ by image."""
        parts = []
        for query, key, table in zip(self.query, self.key, tables, strict=True):
            rows = query[:, :, None] + key[..., None, :]
            parts.append(
                table.index_select(1, rows.flatten()).unflatten(1, rows.shape).movedim(0, -3)
            )
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
        query, maps: as in :func:`.cyclic.cyclic_attention`.
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
            # Each is in several products, which copy what is not contiguous.
            q, k, v = (t.contiguous() for t in (q * q.shape[-1] ** -0.5, k, v))
            g = _heads(_rows(gradient[image], keys, rows), heads).contiguous()
            logits = (q @ k.mT).to(tables[0].dtype).add_(_added(bias, tables, keys, image, rows))
            p = logits.softmax(-1)
            grad_v = p.to(q.dtype).mT @ g
            grad_logits = (g @ v.mT).to(p.dtype)
            grad_logits = torch._softmax_backward_data(grad_logits, p, -1, p.dtype)
            bias.add_gradient(sums, grad_logits, image, rows)
            grad_logits = grad_logits.to(q.dtype)
            grad_q = (grad_logits @ k).mul_(q.shape[-1] ** -0.5)
            _put(grad_query[image], keys, rows, grad_q.transpose(1, 2).flatten(2))
            grad_kv = grad_v.new_empty(len(k), k.shape[2], 2, *k.shape[1::2])
            grad_kv[:, :, 0] = (grad_logits.mT @ q).transpose(1, 2)
            grad_kv[:, :, 1] = grad_v.transpose(1, 2)
            grad_maps.index_add_(0, tokens, grad_kv.reshape(len(tokens), -1))
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
