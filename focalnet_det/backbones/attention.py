"""Define modules for both versions of focal attention, with the official parameter names."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import channels_last, has_hooks
from ..ops import cyclic, focal_attention, nearest, window_attention
from ..ops.focal_attention import AttentionTables
from ..ops.focal_block import policy
from ..ops.nearest import OffsetMlp, StoredSets
from ..ops.window_attention import WindowGrid
from ..ops.window_layout import neighbor_columns

TOPK_BUFFER = "topk_cloest_indice_"  # prefix of the buffers, spelled as in the official files


class WindowAttention(nn.Module):
    """Base class of both versions of focal attention: projections around window attention.

    Args:
        dim: channels C.
        num_heads: number of attention heads.
        window_size: side of a window, tokens.
    """

    def __init__(self, dim: int, *, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pool: nn.Module, valid: Tensor | None = None) -> Tensor:
        """Attend from all tokens of a feature map.

        Args:
            x: (N, H, W, C), normalized.
            pool: maps the cells of a window, (..., window_size^2), to one pooled token, (..., 1).
            valid: (N, 1, H, W), one inside an image and zero in the batch padding.
        Returns: (N, H, W, C).
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
        if policy.forced_backend() == "reference" and valid is None and not recorded:
            qkv, summary = self.qkv(x), self.qkv(pooled)[..., channels:]
            out = self.reference(qkv, summary.unflatten(1, (size.rows, size.columns)), size)
        else:
            query, maps = self._project(windows, pooled)
            out = self.attend(query, maps, size, valid)
            out = focal_attention.from_windows(out, *padded, self.window_size)
        out = self.proj(out)
        if recorded:
            # A slice would specialize the graph to maps that windows do, or do not, fill.
            rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
            return out.index_select(1, rows).index_select(2, columns)
        return out if padded == (height, width) else out[:, :height, :width]

    def reference(self, qkv: Tensor, pooled: Tensor, size: WindowGrid) -> Tensor:
        """Attend as the published code does.

        Args:
            qkv: (N, H, W, 3C), queries, keys and values of the padded map.
            pooled: (N, rows, columns, 2C), keys and values of the pooled tokens.
            size: size of the map without padding.
        Returns: (N, H, W, C).
        """
        raise NotImplementedError

    def attend(self, query: Tensor, maps: Tensor, size: WindowGrid, valid: Tensor | None) -> Tensor:
        """Attend with one gather per window, which is faster.

        Args:
            query: (N, windows, cells, C).
            maps: (N * tokens + N * windows, 2C).
            size: size of the map without padding.
            valid: (N, 1, H, W) or None; for all arguments see
                :func:`focalnet_det.ops.cyclic.cyclic_attention`.
        Returns: (N, windows, cells, C).
        """
        raise NotImplementedError

    def _project(self, windows: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Project (N, windows, cells, C) and (N, windows, C) to queries, and to keys and values.

        Returns: (N, windows, cells, C), and (N * tokens + N * windows, 2C), pooled tokens last.
        """
        n, count, cells, channels = windows.shape
        tokens = torch.cat((windows.reshape(-1, channels), pooled.reshape(-1, channels)))
        if type(self.qkv) is nn.Linear and not has_hooks(self.qkv):
            weight, bias = self.qkv.weight, self.qkv.bias
            # Pooled tokens are keys only: no queries are computed for them.
            query = F.linear(tokens[: n * count * cells], weight[:channels], bias[:channels])
            maps = F.linear(tokens, weight[channels:], bias[channels:])
        else:
            query, maps = self.qkv(tokens).split((channels, 2 * channels), dim=-1)
            query, maps = query[: n * count * cells].contiguous(), maps.contiguous()
        return query.reshape(n, count, cells, channels), maps


def _pooled(windows: Tensor, pool: nn.Module) -> Tensor:
    """Pool the cells of each window, (N, windows, cells, C) -> (N, windows, C)."""
    if type(pool) is nn.Linear and not has_hooks(pool):
        with policy.without_autocast(windows):
            weight = pool.weight.to(windows.dtype)
            result: Tensor = (weight @ windows)[:, :, 0] + pool.bias.to(windows.dtype)
            return result
    return cast(Tensor, pool(windows.mT))[..., 0]


class FocalAttention(WindowAttention):
    """Version 1: windows read themselves, the cyclic ring around them and pooled tokens.

    Args:
        dim, num_heads, window_size: see :class:`WindowAttention`.
        expand_size: width of the ring of neighbors, tokens; 0 for none.
        focal_window: side of the square of pooled tokens.
    Source: arXiv:2107.00641, section 3.2.
    """

    def __init__(
        self, dim: int, *, num_heads: int, window_size: int, expand_size: int, focal_window: int
    ) -> None:
        super().__init__(dim, num_heads=num_heads, window_size=window_size)
        self.expand_size = expand_size
        self.focal_window = focal_window
        offsets = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
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
        """Return the relative position biases."""
        return AttentionTables(
            self.relative_position_bias_table,
            self.relative_position_bias_table_to_neighbors,
            self.relative_position_bias_table_to_windows[0],
        )

    def reference(self, qkv: Tensor, pooled: Tensor, size: WindowGrid) -> Tensor:
        """Attend as the published code does; see the base class."""
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
        """Attend with one gather per window; see the base class."""
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
    """Version 2 ("focal fast"): windows read the tokens and pooled tokens closest to their centers.

    Official files store the sets of closest tokens for one map size. Where several tokens are
    equally close, the stored sets decide on maps of that size; they are part of the state dict.

    Args:
        dim, num_heads, window_size: see :class:`WindowAttention`.
        top_k: number of tokens that a window reads of each level, if the map has as many.
    Source: microsoft/Focal-Transformer:classification/focal_transformer_v2.py.
    """

    def __init__(self, dim: int, *, num_heads: int, window_size: int, top_k: int) -> None:
        super().__init__(dim, num_heads=num_heads, window_size=window_size)
        self.top_k = top_k
        self.coord2rpb_all = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, num_heads)) for _ in range(2)
        )
        for level in range(2):
            self.register_buffer(f"{TOPK_BUFFER}{level}", None)
        self._stored: StoredSets | None = None

    def reference(self, qkv: Tensor, pooled: Tensor, size: WindowGrid) -> Tensor:
        """Attend as the published code does; see the base class."""
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
        """Attend with one gather per window; see the base class."""
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
        """Use the sets of a file on maps of the size that they are for.

        Args:
            sets: (windows, K) each, int64; None to always compute the closest tokens.
        Returns: True if the sets are used, False if they fit no map size.
        """
        stored = nearest.infer_map_size(sets, self.window_size, self.top_k) if sets else None
        self._stored = stored
        device = self.qkv.weight.device
        for level in range(2):
            index = None if stored is None else stored.sets[level].to(device)
            setattr(self, f"{TOPK_BUFFER}{level}", index)
        return stored is not None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        sets = [state_dict.get(f"{prefix}{TOPK_BUFFER}{level}") for level in range(2)]
        if all(isinstance(index, Tensor) for index in sets):
            self.store_sets(cast(tuple[Tensor, Tensor], tuple(sets)))
        elif f"{prefix}qkv.weight" in state_dict:
            self.store_sets(None)  # the sets of earlier weights must not apply to these
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
