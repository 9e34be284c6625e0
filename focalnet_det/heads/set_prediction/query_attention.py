"""Attention and the small layers of transformer decoders."""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.Module):
    """Attention of queries to keys and values, with the parameter names of ``torch.nn``'s.

    A mask that all heads share is never copied per head.

    Args:
        channels: C, a multiple of ``heads``.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None
    ) -> Tensor:
        """Return what the queries read, (N, Q, C).

        Args:
            query: (N, Q, C).
            key, value: (N, K, C).
            blocked: bool, (N, Q, K) or (Q, K), True where a query must not read a key.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if blocked is None else ~blocked.unsqueeze(-3)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Linear layers with ReLU between them; parameters are named ``layers.{i}`` as in DETR.

    Args:
        depth: number of linear layers.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        widths = [in_channels, *[channels] * (depth - 1), out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_channels) -> (..., out_channels)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return cast(Tensor, last(x))
