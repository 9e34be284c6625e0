"""Both versions of focal attention as modules, with the official parameter names."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import channels_last, has_hooks
from ..ops import cyclic, dispatch, focal_attention, nearest, window_attention
from ..ops.focal_attention import AttentionTables
from ..ops.nearest import OffsetMlp, StoredSets
from ..ops.window_attention import WindowGrid
from ..ops.window_layout import neighbor_columns

SETS = "topk_cloest_indice_"  # as spelled in the official files


class WindowAttention(nn.Module):
    """What both versions of focal attention share: projections around attention by windows.

    Args:
        dim: channels C.
        num_heads: number of heads.
        window_size: side of a window, tokens.
    """

    def __init__(self, dim: int, *, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pool: nn.Module, valid: Tensor | None = None) -> Tensor:
        """(N, H, W, C), normed -> (N, H, W, C).

        Args:
            pool: from the cells of a window to one pooled token, for all channels alike.
            valid: (N, 1, H, W), one inside an image and zero in the batch padding.
        """
        _, height, width, channels = x.shape
        size = WindowGrid(height, width, self.window_size)
        if valid is not None:
            x = x * channels_last(valid).to(x.dtype)
        padded = size.rows * self.window_size, size.columns * self.window_size
        recorded = window_attention.is_recording_graph()
        if recorded or padded != (height, width):
            x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        windows = focal_attention.to_windows(x, self.window_size)  # (N, windows, cells, C)
        pooled = _pooled(windows, pool)
        if dispatch.forced_backend() == "reference" and valid is None and not recorded:
            qkv, summary = self.qkv(x), self.qkv(pooled)[..., channels:]
            out = self.reference(qkv, summary.unflatten(1, (size.rows, size.columns)), size)
        else:
            query, maps = self._project(windows, pooled)
            out = self.attend(query, maps, size, valid)
            out = focal_attention.from_windows(out, *padded, self.window_size)
        out = self.proj(out)
        if recorded:
            # A slice would tie the graph to whether windows fill the map.
            rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
            return out.index_select(1, rows).index_select(2, columns)
        return out if padded == (height, width) else out[:, :height, :width]

    def reference(self, qkv: Tensor, pooled: Tensor, size: WindowGrid) -> Tensor:
        """Published computation: (N, H, W, 3C) and (N, rows, columns, 2C) -> (N, H, W, C)."""
        raise NotImplementedError

    def attend(self, query: Tensor, maps: Tensor, size: WindowGrid, valid: Tensor | None) -> Tensor:
        """Fast form; arguments as in :func:`focalnet_det.ops.cyclic.cyclic_attention`."""
        raise NotImplementedError

    def _project(self, windows: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of all windows; keys and values of all tokens, then of the pooled ones."""
        n, count, cells, channels = windows.shape
        tokens = torch.cat((windows.reshape(-1, channels), pooled.reshape(-1, channels)))
        if type(self.qkv) is nn.Linear and not has_hooks(self.qkv):
            weight, bias = self.qkv.weight, self.qkv.bias
            # Pooled tokens ask nothing.
            query = F.linear(tokens[: n * count * cells], weight[:channels], bias[:channels])
            maps = F.linear(tokens, weight[channels:], bias[channels:])
        else:
            query, maps = self.qkv(tokens).split((channels, 2 * channels), dim=-1)
            query, maps = query[: n * count * cells].contiguous(), maps.contiguous()
        return query.reshape(n, count, cells, channels), maps


def _pooled(windows: Tensor, pool: nn.Module) -> Tensor:
    """(N, windows, cells, C) -> (N, windows, C)."""
    if type(pool) is nn.Linear and not has_hooks(pool):
        with dispatch.without_autocast(windows):
            weight = pool.weight.to(windows.dtype)
            result: Tensor = (weight @ windows)[:, :, 0] + pool.bias.to(windows.dtype)
            return result
    return cast(Tensor, pool(windows.mT))[..., 0]


class FocalAttention(WindowAttention):
    """Version 1: a window, the cyclic ring around it and pooled tokens, with tables of biases.

    Args:
        dim, num_heads, window_size: see :class:`WindowAttention`.
        expand_size: width of the ring of neighbors, tokens.
        focal_window: side of the square of pooled tokens.
    Source: arXiv:2107.00641, section 3.2.
    """

    def __init__(
        self, dim: int, *, num_heads: int, window_size: int, expand_size: int, focal_window: int
    ) -> None:
        super().__init__(dim, num_heads=num_heads, window_size=window_size)
        self.expand_size = expand_size
        self.focal_window = focal_window
        own = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(own, num_heads))
        columns = neighbor_columns(window_size, expand_size)
        table = torch.zeros(1, num_heads, window_size**2, columns) if columns else None
        self.relative_position_bias_table_to_neighbors = (
            None if table is None else nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        )
        pooled = torch.zeros(num_heads, (window_size + focal_window - 1) ** 2)
        self.relative_position_bias_table_to_windows = nn.ParameterList(
            [nn.Parameter(nn.init.trunc_normal_(pooled, std=0.02))]
        )

    def tables(self) -> AttentionTables:
        """Position biases."""
        return AttentionTables(
            self.relative_position_bias_table,
            self.relative_position_bias_table_to_neighbors,
            self.relative_position_bias_table_to_windows[0],
        )

    def reference(self, qkv: Tensor, pooled: Tensor, size: WindowGrid) -> Tensor:
        """See the base class."""
        return focal_attention.focal_attention(
            qkv,
            pooled,
            self.tables(),
            heads=self.num_heads,
            window=self.window_size,
            expand=self.expand_size if cyclic.reads_ring(size) else 0,
            focal_window=self.focal_window,
        )

    def attend(self, query: Tensor, maps: Tensor, size: WindowGrid, valid: Tensor | None) -> Tensor:
        """See the base class."""
        return cyclic.cyclic_attention(
            query,
            maps,
            self.tables(),
            size,
            heads=self.num_heads,
            expand=self.expand_size,
            focal_window=self.focal_window,
            valid=valid,
        )


class NearestAttention(WindowAttention):
    """Version 2 ("focal fast"): the tokens and pooled tokens closest to the center of a window.

    Args:
        dim, num_heads, window_size: see :class:`WindowAttention`.
        top_k: tokens read of each level, or as many as there are.
    Source: microsoft/Focal-Transformer:classification/focal_transformer_v2.py.

    Files store the sets of closest tokens for one size of map. Where several tokens are equally
    close, those sets decide, on that size; they are then part of this module's state too.
    """

    def __init__(self, dim: int, *, num_heads: int, window_size: int, top_k: int) -> None:
        super().__init__(dim, num_heads=num_heads, window_size=window_size)
        self.top_k = top_k
        self.coord2rpb_all = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, num_heads)) for _ in range(2)
        )
        for level in range(2):
            self.register_buffer(f"{SETS}{level}", None)
        self._stored: StoredSets | None = None

    def reference(self, qkv: Tensor, pooled: Tensor, size: WindowGrid) -> Tensor:
        """See the base class."""
        stored = self._stored
        fits = stored is not None and stored.size == size
        sets = (
            stored.sets if stored is not None and fits else nearest.nearest_sets(size, self.top_k)
        )
        device = qkv.device
        first, second = self.coord2rpb_all
        return focal_attention.nearest_attention(
            qkv,
            pooled,
            (sets[0].to(device), sets[1].to(device)),
            (lambda offsets: first(offsets.to(qkv.dtype)),
             lambda offsets: second(offsets.to(qkv.dtype))),
            heads=self.num_heads,
            window=self.window_size,
            width=size.width,
        )  # fmt: skip

    def attend(self, query: Tensor, maps: Tensor, size: WindowGrid, valid: Tensor | None) -> Tensor:
        """See the base class."""
        return nearest.nearest_attention(
            query,
            maps,
            cast(
                tuple[OffsetMlp, OffsetMlp],
                tuple(
                    OffsetMlp(mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias)  # type: ignore[index]
                    for mlp in self.coord2rpb_all
                ),
            ),
            size,
            heads=self.num_heads,
            count=self.top_k,
            stored=self._stored,
            valid=valid,
        )

    def store_sets(self, sets: tuple[Tensor, Tensor] | None) -> bool:
        """Use sets of a file, (windows, K) each, where maps have the size that they are for.

        Sets for no size of map, and None, leave the closest tokens to be found on every size.

        Returns: whether there is such a size.
        """
        stored = nearest.infer_map_size(sets, self.window_size, self.top_k) if sets else None
        self._stored = stored
        device = self.qkv.weight.device
        for level in range(2):
            numbers = None if stored is None else stored.sets[level].to(device)
            setattr(self, f"{SETS}{level}", numbers)
        return stored is not None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **more: Any
    ) -> None:
        found = [state_dict.get(f"{prefix}{SETS}{level}") for level in range(2)]
        if all(isinstance(numbers, Tensor) for numbers in found):
            self.store_sets(cast(tuple[Tensor, Tensor], tuple(found)))
        elif f"{prefix}qkv.weight" in state_dict:
            self.store_sets(None)  # other weights
        super()._load_from_state_dict(state_dict, prefix, *arguments, **more)
