"""Compute focal attention, versions 1 and 2: the readable references.

They read neighbors as the published code does: by cyclic shifts and sliding windows (version 1),
or from a list of the tokens closest to a window (version 2). :mod:`.cyclic` and :mod:`.nearest`
compute the same faster.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .window_layout import neighbor_cells, offset_index


class AttentionTables(NamedTuple):
    """Relative position biases of version 1.

    Attributes:
        local: (``(2w-1)^2``, heads), indexed by the offset between two cells of a window of side w.
        neighbors: (1, heads, ``w^2``, columns), indexed by query cell and column of
            :func:`.window_layout.neighbor_cells`; None without neighbors.
        windows: (heads, ``(w-1+f)^2``), indexed by the offset between a cell and one of the f x f
            pooled tokens around the window.
    """

    local: Tensor
    neighbors: Tensor | None
    windows: Tensor


def to_windows(x: Tensor, window: int) -> Tensor:
    """Partition (N, H, W, C) into (N, windows, window^2, C), row by row.

    H and W must be multiples of ``window``.
    """
    n, height, width, channels = x.shape
    x = x.reshape(n, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(n, -1, window * window, channels)


def from_windows(x: Tensor, height: int, width: int, window: int) -> Tensor:
    """Merge (N, windows, window^2, C) into (N, H, W, C), the inverse of :func:`to_windows`."""
    n, _, _, channels = x.shape
    x = x.reshape(n, height // window, width // window, window, window, channels)
    return x.transpose(2, 3).reshape(n, height, width, channels)


def focal_attention(
    qkv: Tensor,
    pooled: Tensor,
    tables: AttentionTables,
    *,
    heads: int,
    window: int,
    expand: int,
    focal_window: int,
) -> Tensor:
    """Attend from each window to itself, its cyclic neighbors and the pooled tokens around it.

    Args:
        qkv: (N, H, W, 3C), queries, keys and values of the padded map; sides are multiples of
            ``window``.
        pooled: (N, H / window, W / window, 2C), keys and values of the pooled tokens.
        tables: relative position biases.
        heads: number of heads.
        window: side of a window, tokens.
        expand: width of the ring of neighbors, tokens; 0 for none.
        focal_window: side of the square of pooled tokens, odd.
    Returns: (N, H, W, C), heads concatenated.
    Source: arXiv:2107.00641, section 3.2; microsoft/Focal-Transformer:classification/
    focal_transformer.py (WindowAttention). As there, shifts wrap around the map without a mask.
    """
    height, width, channels = *qkv.shape[1:3], qkv.shape[3] // 3
    query = _heads(to_windows(qkv[..., :channels], window), heads)
    maps = qkv[..., channels:]
    columns, biases = [to_windows(maps, window)], [_local_bias(tables.local, window)]
    if expand and tables.neighbors is not None:
        for shift, cells in neighbor_cells(window, expand):
            rolled = torch.roll(maps, shifts=(-shift[0], -shift[1]), dims=(1, 2))
            columns.append(to_windows(rolled, window)[:, :, list(cells)])
        biases.append(tables.neighbors[0])
    columns.append(_unfold(pooled, focal_window))
    index = offset_index(window, focal_window, focal_window - 1, qkv.device)
    biases.append(tables.windows[:, index.flatten()].unflatten(1, index.shape))
    key, value = (_heads(x, heads) for x in torch.cat(columns, dim=2).chunk(2, dim=-1))
    # (N, windows, heads, cells, columns)
    logits = (query * (channels // heads) ** -0.5) @ key.mT + torch.cat(biases, dim=-1)
    out = _mask_outside(logits, pooled, focal_window).softmax(-1) @ value
    return from_windows(out.transpose(2, 3).flatten(3), height, width, window)


def _mask_outside(logits: Tensor, pooled: Tensor, focal_window: int) -> Tensor:
    """Add -100, the published value, to the logits of pooled tokens outside the map.

    Args:
        logits: (N, windows, heads, cells, columns); pooled tokens are the last columns.
        pooled: (N, h, w, 2C).
        focal_window: side of the square of pooled tokens.
    """
    outside = _unfold(torch.ones_like(pooled[:1, ..., :1]), focal_window)[..., 0] == 0
    penalty = outside[:, :, None, None].to(logits.dtype) * -100.0
    count = focal_window**2
    return torch.cat([logits[..., :-count], logits[..., -count:] + penalty], dim=-1)


def _local_bias(table: Tensor, window: int) -> Tensor:
    index = offset_index(window, window, window - 1, table.device)
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split heads: (..., tokens, C) -> (..., heads, tokens, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _unfold(pooled: Tensor, size: int) -> Tensor:
    """Gather the square around each token, (N, h, w, C) -> (N, h * w, size^2, C), zero outside."""
    n, height, width, channels = pooled.shape
    squares = F.unfold(pooled.permute(0, 3, 1, 2), size, padding=size // 2)
    return squares.reshape(n, channels, size * size, height * width).permute(0, 3, 2, 1)


def nearest_attention(
    qkv: Tensor,
    pooled: Tensor,
    sets: tuple[Tensor, Tensor],
    bias: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    *,
    heads: int,
    window: int,
    width: int,
) -> Tensor:
    """Attend from each window to its closest tokens and its closest pooled tokens.

    Args:
        qkv: (N, H, W, 3C), queries, keys and values of the padded map.
        pooled: (N, H / window, W / window, 2C), keys and values of the pooled tokens.
        sets: (windows, K) each: row-major indices of tokens in the map without padding, and of
            pooled tokens.
        bias: for each level, a function from offsets (..., 2: rows, columns) between key and query,
            in tokens, to biases (..., heads).
        heads, window: as in :func:`focal_attention`.
        width: width of the map without padding, tokens.
    Returns: (N, H, W, C).
    Source: arXiv:2107.00641; microsoft/Focal-Transformer:classification/focal_transformer_v2.py.
    """
    height, padded_width, channels = *qkv.shape[1:3], qkv.shape[3] // 3
    query = _heads(to_windows(qkv[..., :channels], window), heads)
    tokens, windows = sets
    fine = qkv[..., channels:].flatten(1, 2)
    index = tokens // width * padded_width + tokens % width
    columns = torch.cat((fine[:, index], pooled.flatten(1, 2)[:, windows]), dim=2)
    key, value = (_heads(x, heads) for x in columns.chunk(2, dim=-1))
    offsets = _offsets_to_query(sets, (height, padded_width), window, width)
    biases = [level(offset) for level, offset in zip(bias, offsets, strict=True)]
    logits = (query * (channels // heads) ** -0.5) @ key.mT
    logits = logits + torch.cat(biases, dim=2).permute(0, 3, 1, 2)
    out = logits.softmax(-1) @ value
    return from_windows(out.transpose(2, 3).flatten(3), height, padded_width, window)


def _offsets_to_query(
    sets: tuple[Tensor, Tensor], padded_size: tuple[int, int], window: int, width: int
) -> list[Tensor]:
    """Return the offsets between keys and queries of both levels, in tokens.

    Args:
        sets, window, width: as in :func:`nearest_attention`.
        padded_size: (height, width) of the padded map, tokens.
    Returns: (windows, window^2, K, 2: rows, columns) each.
    """
    (height, padded_width), (tokens, windows) = padded_size, sets
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(padded_width))
    cells = to_windows(grid.reshape(1, height, padded_width, 2), window)[0].to(tokens.device)
    grid = torch.cartesian_prod(
        torch.arange(height // window), torch.arange(padded_width // window)
    )
    centers = (grid * window + window // 2).to(tokens.device)
    positions = torch.stack((tokens // width, tokens % width), dim=-1), centers[windows]
    return [cells[:, :, None] - position[:, None] for position in positions]
