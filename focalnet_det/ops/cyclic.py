"""Focal attention, version 1: a window, the cyclic ring around it and pooled tokens, in one gather.

A token of the ring that the published code reads twice, with biases b1 and b2, is read once with
``logaddexp(b1, b2)``, which is the same sum.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import without_autocast
from .focal_attention import AttentionTables
from .window_attention import Keys, Map, SharedBias, attend, looked_up, recording, token_numbers
from .window_layout import offset_index, ring


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
        assert keys.inside is not None
        assert keys.order is not None
        return keys._replace(
            tokens=keys.tokens.to(device),
            inside=keys.inside.to(device),
            order=keys.order.to(device),
        )


def cyclic_bias(tables: AttentionTables, window: int, focal_window: int, *, ring_read: bool,
                expand: int) -> Tensor:  # fmt: skip
    """(heads, window^2, columns), of the columns of :func:`cyclic_keys`, at least float32."""
    device = tables.own.device
    own = offset_index(window, window, window - 1, device)
    parts = [looked_up(_wide(tables.own), 0, own).permute(2, 0, 1)]
    if tables.neighbors is not None and not ring_read and torch.is_grad_enabled():
        # Gradients of zero instead of none, which DistributedDataParallel refuses.
        parts[0] = parts[0] + 0.0 * tables.neighbors.sum()
    if ring_read and tables.neighbors is not None:
        _, columns, second = ring(window, expand)
        table = _wide(tables.neighbors[0])
        once = table.index_select(2, torch.tensor(columns, device=device))
        single = len(columns) - len(second)
        twice = torch.tensor(second, dtype=torch.int64, device=device)
        other = table.index_select(2, twice)
        parts += [once[:, :, :single], torch.logaddexp(once[:, :, single:], other)]
    pooled = offset_index(window, focal_window, focal_window - 1, device)
    parts.append(looked_up(_wide(tables.windows), 1, pooled))
    return torch.cat(parts, dim=2)


def _wide(table: Tensor) -> Tensor:
    return table if table.dtype == torch.float64 else table.float()


def cyclic_attention(
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
