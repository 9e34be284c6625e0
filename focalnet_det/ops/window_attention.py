"""Attend from windows to tokens given by index: one gather and one product per window.

Which tokens a window reads does not depend on the features, so the indices are computed once per
map size.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .focal_block.policy import is_exporting, is_tracing

# Elements of the largest intermediate tensor of a step on CPUs, sized for their caches.
CHUNK = 2**18


class WindowKeys(NamedTuple):
    """The keys that the windows of a map read, one row of columns per window.

    Attributes:
        tokens: (windows, columns) or (N, windows, columns), int64 indices of the tokens: those of
            the map window by window (:func:`token_index`), then the pooled ones.
        inside: same shape, bool, False where a column has no token; None if every column has one.
        order: (windows,), window of each row; None if the rows are in order.
        complete: number of leading rows in which every column has a token.
    """

    tokens: Tensor
    inside: Tensor | None = None
    order: Tensor | None = None
    complete: int = 0


class WindowGrid(NamedTuple):
    """Size of a token map, without the padding to whole windows, and of its windows.

    Attributes:
        height, width: sides of the map, tokens.
        window: side of a window, tokens.
    """

    height: int
    width: int
    window: int

    @property
    def rows(self) -> int:
        """Return the number of rows of windows."""
        return (self.height + self.window - 1) // self.window

    @property
    def columns(self) -> int:
        """Return the number of columns of windows."""
        return (self.width + self.window - 1) // self.window

    @property
    def windows(self) -> int:
        """Return the number of windows."""
        return self.rows * self.columns

    @property
    def cells(self) -> int:
        """Return the number of cells of a window."""
        return self.window * self.window


def token_index(y: Tensor, x: Tensor, size: WindowGrid) -> Tensor:
    """Return the indices of the tokens at rows y and columns x, counted window by window."""
    w = size.window
    return (y // w * size.columns + x // w) * size.cells + y % w * w + x % w


def lookup_rows(table: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Index a table along ``dim``, which is replaced by the dimensions of ``rows``."""
    return table.index_select(dim, rows.flatten()).unflatten(dim, rows.shape)


def is_recording_graph() -> bool:
    """Tell whether a graph is being recorded, which must not hold constant sizes or tensors."""
    return torch.compiler.is_compiling() or is_tracing() or is_exporting()


class SharedBias:
    """A bias that all windows share; its table is the bias, (heads, cells, columns)."""

    def values(self, tables: Sequence[Tensor], _image: int, _windows: slice) -> Tensor:
        """Return the biases of a chunk of windows, (1, heads, cells, columns)."""
        return tables[0][None]

    def all_values(self, tables: Sequence[Tensor]) -> Tensor:
        """Return the biases of all windows, (1, heads, cells, columns)."""
        return tables[0][None]

    def add_gradient(
        self, sums: Sequence[Tensor], gradient: Tensor, _image: int, _windows: slice
    ) -> None:
        """Add the gradient of a chunk to the gradients of the tables.

        Args:
            sums: gradients of the tables, updated in place.
            gradient: (windows, heads, cells, columns), of the biases.
        """
        sums[0].add_(gradient.sum(0))


class GridBias(NamedTuple):
    """Biases looked up by the offset between query and key, in one table per level of keys.

    A table is (heads, offsets); the index of an offset is the sum of a term of the query and a term
    of the key.

    Attributes:
        query: (windows, cells), int64, for each level.
        key: (windows, columns) or (N, windows, columns), int64, for each level.
    """

    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]

    def _lookup(self, level: int, image: int, windows: slice) -> Tensor:
        key = self.key[level][image] if self.key[level].ndim == 3 else self.key[level]
        return self.query[level][windows][:, :, None] + key[windows][:, None]

    def values(self, tables: Sequence[Tensor], image: int, windows: slice) -> Tensor:
        """Return the biases of a chunk of windows, (windows, heads, cells, columns)."""
        parts = []
        for level, table in enumerate(tables):
            rows = self._lookup(level, image, windows)
            parts.append(lookup_rows(table, 1, rows))
        return torch.cat(parts, dim=-1).transpose(0, 1)

    def all_values(self, tables: Sequence[Tensor]) -> Tensor:
        """Return the biases of all windows, (windows, heads, cells, columns).

        A leading dimension of images is added if the keys differ between images.
        """
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
        """Add the gradient of a chunk to the gradients of the tables; see :class:`SharedBias`."""
        lengths = [key.shape[-1] for key in self.key]
        for level, part in enumerate(gradient.split(lengths, dim=-1)):
            rows = self._lookup(level, image, windows).flatten()
            sums[level].index_add_(1, rows, part.transpose(0, 1).flatten(1).to(sums[level].dtype))


Bias = SharedBias | GridBias


def attend(
    query: Tensor,
    maps: Tensor,
    keys: WindowKeys,
    bias: Bias,
    tables: tuple[Tensor, ...],
    heads: int,
) -> Tensor:
    """Apply scaled dot-product attention from every window to its keys.

    Args:
        query: (N, windows, cells, C).
        maps: (N * tokens + N * windows, 2C), see :func:`.cyclic.cyclic_attention`.
        keys: keys of all windows.
        bias: how to look up the biases in ``tables``.
        tables: float32 or float64, shapes as ``bias`` says.
        heads: number of heads.
    Returns: (N, windows, cells, C), in the dtype of ``query``.
    """
    if is_recording_graph() or torch._C._are_functorch_transforms_active():
        return _attend_unchunked(query, maps, keys, bias, tables, heads)
    result: Tensor = _Attention.apply(query, maps, keys, bias, heads, *tables)
    return result


def _attend_unchunked(
    query: Tensor,
    maps: Tensor,
    keys: WindowKeys,
    bias: Bias,
    tables: tuple[Tensor, ...],
    heads: int,
) -> Tensor:
    """Attend with stock operators only, for recorded graphs."""
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
    mask = _masked(bias.all_values(tables), keys.inside)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    out = out.transpose(2, 3).flatten(3)
    return out if keys.order is None else out[:, torch.argsort(keys.order)]


def _masked(bias: Tensor, inside: Tensor | None) -> Tensor:
    """Add a large negative number to the biases where there is no key.

    It is finite, so that rows without any key stay finite, and fits float16 (at most 65504).
    """
    if inside is None:
        return bias
    zero = torch.zeros((), dtype=bias.dtype, device=bias.device)
    return bias + torch.where(inside, zero, zero - 30000.0)[..., None, None, :]


class _Attention(torch.autograd.Function):
    """Attention in chunks of windows; only the projected maps are saved for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        maps: Tensor,
        keys: WindowKeys,
        bias: Bias,
        heads: int,
        *tables: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(query, maps, *tables)
        ctx.layout = keys, bias, heads
        out = torch.empty_like(query)
        for image, rows in _chunks(query, keys, heads):
            q, k, v, _ = _gather(query, maps, keys, heads, image, rows)
            mask = _chunk_bias(bias, tables, keys, image, rows).to(q.dtype)
            mask = mask.expand(len(q), -1, -1, -1)
            part = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            _scatter_windows(out[image], keys, rows, part.transpose(1, 2).flatten(2))
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
            # Each is an operand of several products, which would copy a non-contiguous one.
            q, k, v = (t.contiguous() for t in (q * q.shape[-1] ** -0.5, k, v))
            g = _heads(_select_windows(gradient[image], keys, rows), heads).contiguous()
            logits = (
                (q @ k.mT).to(tables[0].dtype).add_(_chunk_bias(bias, tables, keys, image, rows))
            )
            p = logits.softmax(-1)
            grad_v = p.to(q.dtype).mT @ g
            grad_logits = (g @ v.mT).to(p.dtype)
            grad_logits = torch._softmax_backward_data(grad_logits, p, -1, p.dtype)
            bias.add_gradient(sums, grad_logits, image, rows)
            grad_logits = grad_logits.to(q.dtype)
            grad_q = (grad_logits @ k).mul_(q.shape[-1] ** -0.5)
            _scatter_windows(grad_query[image], keys, rows, grad_q.transpose(1, 2).flatten(2))
            grad_kv = grad_v.new_empty(len(k), k.shape[2], 2, *k.shape[1::2])
            grad_kv[:, :, 0] = (grad_logits.mT @ q).transpose(1, 2)
            grad_kv[:, :, 1] = grad_v.transpose(1, 2)
            grad_maps.index_add_(0, tokens, grad_kv.reshape(len(tokens), -1))
        return grad_query, grad_maps, None, None, None, *sums


def _chunks(query: Tensor, keys: WindowKeys, heads: int) -> list[tuple[int, slice]]:
    """Split the windows of each image into chunks of rows.

    Rows with and without a mask are never in one chunk.

    Returns: (image, rows) of each chunk.
    """
    _, windows, cells, _ = query.shape
    step = windows
    if query.device.type == "cpu":
        step = max(1, CHUNK // (cells * keys.tokens.shape[-1] * heads))
    borders = [0, keys.complete, windows] if keys.inside is not None else [0, windows]
    parts = [
        slice(first, min(first + step, end))
        for begin, end in itertools.pairwise(borders)
        for first in range(begin, end, step)
    ]
    return [(image, part) for image in range(len(query)) for part in parts]


def _select_windows(x: Tensor, keys: WindowKeys, rows: slice) -> Tensor:
    """Select the windows of some rows from (windows, cells, C)."""
    return x[rows] if keys.order is None else x.index_select(0, keys.order[rows])


def _scatter_windows(x: Tensor, keys: WindowKeys, rows: slice, part: Tensor) -> None:
    """Write the windows that :func:`_select_windows` reads, in place."""
    if keys.order is None:
        x[rows] = part
    else:
        x.index_copy_(0, keys.order[rows], part)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split heads: (windows, cells, C) -> (windows, heads, cells, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _gather(
    query: Tensor, maps: Tensor, keys: WindowKeys, heads: int, image: int, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather queries, keys and values of a chunk, and the rows of ``maps`` that it reads.

    Returns: (windows, heads, cells, d), twice (windows, heads, columns, d), and
        (windows * columns,).
    """
    n, windows, cells, _ = query.shape
    tokens = keys.tokens[image][rows] if keys.tokens.ndim == 3 else keys.tokens[rows]
    if n > 1:
        # Rows of `maps`: the tokens of all images come before all pooled tokens.
        count = windows * cells
        pooled = tokens >= count
        tokens = tokens + image * count + pooled * ((n - 1 - image) * count + image * windows)
    kv = maps.index_select(0, tokens.flatten())
    kv = kv.reshape(*tokens.shape, 2, heads, -1).permute(2, 0, 3, 1, 4)
    return _heads(_select_windows(query[image], keys, rows), heads), kv[0], kv[1], tokens.flatten()


def _chunk_bias(
    bias: Bias, tables: Sequence[Tensor], keys: WindowKeys, image: int, rows: slice
) -> Tensor:
    """Return biases plus mask of a chunk, (windows or 1, heads, cells, columns)."""
    values = bias.values(tables, image, rows)
    if keys.inside is None or rows.stop <= keys.complete:
        return values
    inside = keys.inside[image] if keys.inside.ndim == 3 else keys.inside
    return _masked(values, inside[rows])
