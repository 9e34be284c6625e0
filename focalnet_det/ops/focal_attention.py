"""Readable references of focal attention, versions 1 and 2.

They read neighbors as the published code does: by cyclic shifts and sliding windows (version 1),
or from a list of the tokens closest to a window (version 2). The faster forms of the same
computations are in :mod:`.cyclic` and :mod:`.nearest`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .window_layout import neighbor_cells, offset_index


class AttentionTables(NamedTuple):
    """Position biases of version 1, named as in the official files.

    Attributes:
        own: (``(2w-1)^2``, heads), by offset between two cells of a window of side w.
        neighbors: (1, heads, ``w^2``, columns), query cell by column of
            :func:`.window_layout.neighbor_cells`; None where there are no neighbors.
        windows: (heads, ``(w-1+f)^2``), by offset between a cell and a pooled token of the
            f x f around the window.
    """

    own: Tensor
    neighbors: Tensor | None
    windows: Tensor


def to_windows(x: Tensor, window: int) -> Tensor:
    """(N, H, W, C) -> (N, windows, window^2, C), row by row; sides are multiples of ``window``."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(n, -1, window * window, channels)


def from_windows(x: Tensor, height: int, width: int, window: int) -> Tensor:
    """Inverse of :func:`to_windows`."""
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
    """Attention of each window to itself, its cyclic neighbors and the pooled tokens around.

    Args:
        qkv: (N, H, W, 3C), queries, keys and values of the padded map; sides are multiples of
            ``window``.
        pooled: (N, H / window, W / window, 2C), keys and values of the pooled tokens.
        tables: position biases.
        heads: number of heads.
        window: side of a window, tokens.
        expand: cells of neighbors on each side; 0 leaves them out.
        focal_window: side of the square of pooled tokens, odd.
    Returns: (N, H, W, C), heads joined.
    Source: arXiv:2107.00641, section 3.2; microsoft/Focal-Transformer:classification/
    focal_transformer.py (WindowAttention). Shifts wrap round the map, with no mask, as there.
    """
    n, height, width, channels = qkv.shape[0], *qkv.shape[1:3], qkv.shape[3] // 3
    query = _heads(to_windows(qkv[..., :channels], window), heads)
    maps = qkv[..., channels:]
    columns, biases = [to_windows(maps, window)], [_own_bias(tables.own, window)]
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
    outside = _unfold(torch.ones_like(pooled[:1, ..., :1]), focal_window)[..., 0] == 0
    penalty = outside[:, :, None, None].to(logits.dtype) * -100.0
    logits = torch.cat(
        [
            logits[..., : -(focal_window**2)],
            logits[..., -(focal_window**2) :] + penalty,
        ],
        dim=-1,
    )
    out = logits.softmax(-1) @ value
    return from_windows(out.transpose(2, 3).flatten(3), height, width, window).reshape(
        n, height, width, channels
    )


def _own_bias(table: Tensor, window: int) -> Tensor:
    index = offset_index(window, window, window - 1, table.device)
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(..., tokens, C) -> (..., heads, tokens, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _unfold(pooled: Tensor, size: int) -> Tensor:
    """(N, h, w, C) -> (N, h * w, size^2, C): the square around each token, zero outside."""
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
    """Attention of each window to its closest tokens and its closest pooled tokens.

    Args:
        qkv: (N, H, W, 3C), queries, keys and values of the padded map.
        pooled: (N, H / window, W / window, 2C).
        sets: (windows, K) each: row-major numbers of tokens in the map without padding, and of
            pooled tokens.
        bias: of each level, offsets (..., 2: rows, columns) from key to query, in tokens, to
            (..., heads).
        heads, window: as in :func:`focal_attention`.
        width: of the map without padding, tokens.
    Returns: (N, H, W, C).
    Source: arXiv:2107.00641; microsoft/Focal-Transformer:classification/focal_transformer_v2.py.
    """
    height, padded_width, channels = *qkv.shape[1:3], qkv.shape[3] // 3
    rows, across = height // window, padded_width // window
    query = _heads(to_windows(qkv[..., :channels], window), heads)
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(padded_width))
    cells = to_windows(grid.reshape(1, height, padded_width, 2), window)[0].to(qkv.device)
    centers = torch.cartesian_prod(torch.arange(rows), torch.arange(across)) * window + window // 2
    tokens, windows = sets
    places = (
        torch.stack((tokens // width, tokens % width), dim=-1),
        centers.to(qkv.device)[windows],
    )
    fine = qkv[..., channels:].flatten(1, 2)
    number = tokens // width * padded_width + tokens % width
    columns = torch.cat((fine[:, number], pooled.flatten(1, 2)[:, windows]), dim=2)
    key, value = (_heads(x, heads) for x in columns.chunk(2, dim=-1))
    biases = [
        level(cells[:, :, None] - place[:, None]) for level, place in zip(bias, places, strict=True)
    ]
    logits = (query * (channels // heads) ** -0.5) @ key.mT
    logits = logits + torch.cat(biases, dim=2).permute(0, 3, 1, 2)
    out = logits.softmax(-1) @ value
    return from_windows(out.transpose(2, 3).flatten(3), height, padded_width, window)
