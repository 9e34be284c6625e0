"""Compute focal attention, version 1, with one gather per window.

A window reads its own tokens, the cyclic ring around it and pooled tokens. A token of the ring that
the published code reads twice, with biases b1 and b2, is read once with ``logaddexp(b1, b2)``: the
sum of its two terms in the softmax.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .focal_attention import AttentionTables
from .focal_block.policy import without_autocast
from .window_attention import (
    SharedBias,
    WindowGrid,
    WindowKeys,
    attend,
    is_recording_graph,
    lookup_rows,
    token_index,
)
from .window_layout import offset_index, ring


def reads_ring(size: WindowGrid) -> bool:
    """Tell whether windows read their neighbors, which they do not on a map that one window spans.

    Source: microsoft/Focal-Transformer:classification/focal_transformer.py, whose blocks have no
    neighbors when they are built for maps of at most one window.
    """
    return min(size.height, size.width) > size.window


def cyclic_keys(
    size: WindowGrid,
    expand: int,
    focal_window: int,
    device: torch.device,
    *,
    static_layout: bool = False,
) -> WindowKeys:
    """Return the keys of version 1: the window, the cyclic ring around it, and pooled tokens.

    Args:
        size: size of the map.
        expand: width of the ring, tokens; 0 leaves it out.
        focal_window: side of the square of pooled tokens.
        device: device of the result.
        static_layout: for recorded graphs, return all windows in order, with the ring masked rather
            than left out on small maps.
    """
    w, rows, columns = size.window, size.rows, size.columns
    with_ring = expand > 0 and (static_layout or reads_ring(size))
    grid = torch.arange(w, device=device)
    local = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    offsets = torch.cat((local, _ring_offsets(w, expand, device))) if with_ring else local
    top, left = (torch.arange(n, device=device) * w for n in (rows, columns))
    y = (top[:, None] + offsets[:, 0]) % (rows * w)  # (rows, cells)
    x = (left[:, None] + offsets[:, 1]) % (columns * w)
    fine = token_index(y[:, None], x, size).flatten(0, 1)
    pooled, pooled_inside = _pooled_square(rows, columns, focal_window, device)
    tokens = torch.cat((fine, pooled + rows * columns * w * w), dim=1)
    fine_inside = torch.ones_like(fine, dtype=torch.bool)
    if with_ring and static_layout:
        # Tensors rather than Python numbers, which the graph would treat as constants.
        exceeds = [torch.ones(n, device=device).sum() > w for n in (size.height, size.width)]
        is_local = torch.arange(fine.shape[1], device=device) < w * w
        fine_inside = fine_inside & (is_local | (exceeds[0] & exceeds[1]))
    inside = torch.cat((fine_inside, pooled_inside), dim=1)
    if static_layout:
        return WindowKeys(tokens, inside)
    complete = inside.all(1)
    order = torch.argsort(complete.to(torch.uint8), descending=True, stable=True)
    return WindowKeys(tokens[order], inside[order], order, int(complete.sum()))


def _ring_offsets(window: int, expand: int, device: torch.device) -> Tensor:
    return torch.tensor(ring(window, expand).offsets, device=device)


def _pooled_square(
    rows: int, columns: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return indices of the pooled tokens around each window, and which of them exist.

    Returns: two tensors (windows, size^2), int64 and bool.
    """
    reach = torch.arange(size, device=device) - size // 2
    y = torch.arange(rows, device=device)[:, None] + reach
    x = torch.arange(columns, device=device)[:, None] + reach
    inside_y, inside_x = (y >= 0) & (y < rows), (x >= 0) & (x < columns)
    inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
    index = y.clamp(min=0)[:, None, :, None] * columns + x.clamp(min=0)[None, :, None, :]
    index = torch.where(inside, index, torch.zeros_like(index))
    shape = (rows * columns, size * size)
    return index.reshape(shape), inside.reshape(shape)


@functools.lru_cache(maxsize=64)
def _cached_layout(
    size: WindowGrid, expand: int, focal_window: int, device: torch.device
) -> WindowKeys:
    with torch.inference_mode(False), torch.no_grad():
        keys = cyclic_keys(size, expand, focal_window, torch.device("cpu"))
        assert keys.inside is not None
        assert keys.order is not None
        return keys._replace(
            tokens=keys.tokens.to(device),
            inside=keys.inside.to(device),
            order=keys.order.to(device),
        )


def cyclic_bias(tables: AttentionTables, window: int, focal_window: int, *, with_ring: bool,
                expand: int) -> Tensor:  # fmt: skip
    """Look up the biases of the columns of :func:`cyclic_keys`.

    Args:
        tables: relative position biases.
        window, focal_window, expand: as in :func:`cyclic_attention`.
        with_ring: the keys include the ring.
    Returns: (heads, window^2, columns), float32 or float64.
    """
    device = tables.local.device
    local = offset_index(window, window, window - 1, device)
    parts = [lookup_rows(_as_float32(tables.local), 0, local).permute(2, 0, 1)]
    if tables.neighbors is not None and not with_ring and torch.is_grad_enabled():
        # A gradient of zero: DistributedDataParallel refuses parameters without one.
        parts[0] = parts[0] + 0.0 * tables.neighbors.sum()
    if with_ring and tables.neighbors is not None:
        _, columns, second = ring(window, expand)
        table = _as_float32(tables.neighbors[0])
        once = table.index_select(2, torch.tensor(columns, device=device))
        single = len(columns) - len(second)
        twice = torch.tensor(second, dtype=torch.int64, device=device)
        other = table.index_select(2, twice)
        parts += [once[:, :, :single], torch.logaddexp(once[:, :, single:], other)]
    pooled = offset_index(window, focal_window, focal_window - 1, device)
    parts.append(lookup_rows(_as_float32(tables.windows), 1, pooled))
    return torch.cat(parts, dim=2)


def _as_float32(table: Tensor) -> Tensor:
    return table if table.dtype == torch.float64 else table.float()


def cyclic_attention(
    query: Tensor,
    maps: Tensor,
    tables: AttentionTables,
    size: WindowGrid,
    *,
    heads: int,
    expand: int,
    focal_window: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Attend as :func:`focalnet_det.ops.focal_attention.focal_attention` does, but faster.

    Args:
        query: (N, windows, cells, C), queries of the map padded to whole windows.
        maps: (N * tokens + N * windows, 2C), keys and values of all maps, window by window, then
            of all pooled tokens.
        tables: relative position biases.
        size: size of the map.
        heads, expand, focal_window: as in the reference.
        valid: (N, 1, H, W) of the map without padding: one inside an image, zero in the batch
            padding. Windows then read neither padding nor tokens across the border of the map.
    Returns: (N, windows, cells, C), in the dtype of ``query``.
    """
    static = is_recording_graph() or valid is not None
    if static:
        keys = cyclic_keys(size, expand, focal_window, query.device, static_layout=True)
    else:
        keys = _cached_layout(size, expand, focal_window, query.device)
    with_ring = expand > 0 and (static or reads_ring(size))
    with without_autocast(query):
        bias = cyclic_bias(tables, size.window, focal_window, with_ring=with_ring, expand=expand)
        if valid is not None:
            keys = keys._replace(inside=_inside_images(keys, size, expand, valid))
        return attend(query, maps, keys, SharedBias(), (bias,), heads)


def _inside_images(keys: WindowKeys, size: WindowGrid, expand: int, valid: Tensor) -> Tensor:
    """Return which keys lie in their image and are not reached across the border of the map.

    As on a map of that size, an image of at most one window across has no neighbors.

    Returns: (N, windows, columns), bool.
    """
    w, rows, columns = size.window, size.rows, size.columns
    real = F.pad(valid, (0, columns * w - size.width, 0, rows * w - size.height)) > 0
    real = real.reshape(-1, rows, w, columns, w).transpose(2, 3).flatten(3).flatten(1, 2)
    tokens = torch.cat((real.flatten(1), real.any(2)), dim=1)  # (N, tokens + windows)
    inside = tokens[:, keys.tokens] & _not_none(keys.inside)
    if not expand:
        return inside
    offsets = _ring_offsets(w, expand, valid.device)
    top, left = (torch.arange(n, device=valid.device)[:, None] * w for n in (rows, columns))
    y, x = top + offsets[:, 0], left + offsets[:, 1]
    near_y, near_x = (y >= 0) & (y < rows * w), (x >= 0) & (x < columns * w)
    near = (near_y[:, None] & near_x).flatten(0, 1)  # (windows, ring)
    exceeds = [valid[:, 0].amax(dim).sum(1) > w for dim in (2, 1)]
    near = near & (exceeds[0] & exceeds[1])[:, None, None]
    local, ring_end = w * w, w * w + offsets.shape[0]
    parts = inside[..., :local], inside[..., local:ring_end] & near, inside[..., ring_end:]
    return torch.cat(parts, dim=-1)


def _not_none(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask
