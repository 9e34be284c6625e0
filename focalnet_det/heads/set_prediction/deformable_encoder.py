"""Transformer encoder whose tokens attend to few sampled points of all levels."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.deformable_attention import Shapes, deformable_attention


class MultiScaleDeformableAttention(nn.Module):
    """Predict offsets and weights from queries, and sum samples of the projected memory.

    Args:
        channels: C, a multiple of ``heads``.
        levels, points: L and P; each head reads P points of each level.
    Raises: ValueError if ``channels`` is not a multiple of ``heads``.
    Source: arXiv:2010.04159, section 4.1.
    """

    def __init__(
        self, channels: int = 256, *, heads: int = 8, levels: int = 4, points: int = 4
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels ({channels}) must be a multiple of heads ({heads}).")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let each head look into a direction of its own, further with each point."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = direction.view(-1, 1, 1, 2) * steps.expand(self.heads, self.levels, -1, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Return what each query reads, (N, Q, C).

        Args:
            query: (N, Q, C), with its position.
            references: (N or 1, Q, L, 2), points x, y; or (N, Q, L, 4), boxes cxcywh; 0..1.
            memory: (N, S, C), tokens of all levels, without position.
            shapes: (height, width) of each level.
            padding: bool (N, S), True for tokens that nobody reads.
        """
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        per_head = (self.heads, self.levels, self.points)
        # Half precision would lose pixels on maps wider than a hundred.
        offsets = self.sampling_offsets(query).float().unflatten(-1, (*per_head, 2))
        weights = self.attention_weights(query).float().unflatten(-1, (self.heads, -1)).softmax(-1)
        references = references[:, :, None, :, None]
        if references.shape[-1] == 2:
            sizes = [[width, height] for height, width in shapes]
            scale = offsets.new_tensor(sizes).clamp(min=1)[:, None]
            locations = references + offsets / scale
        else:
            locations = references[..., :2] + offsets / self.points * references[..., 2:] * 0.5
        out = deformable_attention(
            value, shapes, locations.expand_as(offsets), weights.unflatten(-1, per_head[1:])
        )
        return cast(Tensor, self.output_proj(out))


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, norms after the residuals.

    Args:
        feedforward: width of the hidden layer.
        dropout: probability, after attention and in the feed-forward network.
    """

    def __init__(
        self,
        channels: int = 256,
        *,
        feedforward: int = 1024,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(
            channels, heads=heads, levels=levels, points=points
        )
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        references: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(N, S, C) -> (N, S, C).

        Args:
            position: (N or 1, S, C), added to the queries.
            references, shapes, padding: as in `MultiScaleDeformableAttention`.
        """
        read = self.self_attn(tokens + position, references, tokens, shapes, padding)
        tokens = self.norm1(tokens + self.dropout(read))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(tokens))))
        return cast(Tensor, self.norm2(tokens + self.dropout(hidden)))


class DeformableEncoder(nn.Module):
    """Layers over the tokens of all levels, with no norm at the end.

    Args:
        layers: how many.
        options: of `DeformableEncoderLayer`.
    """

    def __init__(self, channels: int, layers: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, **options) for _ in range(layers)
        )

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        references: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(N, S, C) -> (N, S, C); arguments as in `DeformableEncoderLayer`."""
        for layer in self.layers:
            tokens = layer(tokens, position, references, shapes, padding)
        return tokens


def cell_centers(shapes: Shapes, valid_ratios: Tensor | None, device: torch.device) -> Tensor:
    """Return the reference points of all tokens on all levels, (N or 1, S, L, 2: x, y).

    Args:
        valid_ratios: (N, L, 2: x, y), part of each level that is not padding; None for all of it.
    """
    points = []
    for height, width in shapes:
        y = (torch.arange(height, device=device) + 0.5) / max(height, 1)
        x = (torch.arange(width, device=device) + 0.5) / max(width, 1)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
        points.append(grid.flatten(0, 1))
    if valid_ratios is None:
        return torch.cat(points)[None, :, None].expand(1, -1, len(shapes), 2)
    # Relative to the valid area of the token's own level, then to that of the level it reads.
    relative = [p / valid_ratios[:, i : i + 1] for i, p in enumerate(points)]
    return torch.cat(relative, dim=1)[:, :, None] * valid_ratios[:, None]


def valid_parts(padding: Sequence[Tensor]) -> Tensor:
    """Return the part of rows and columns that is not padding, (N, L, 2: x, y).

    Args:
        padding: bool (N, H, W) of each level, True at the right and the bottom.
    """
    ratios = []
    for level in padding:
        x, y = (~level[:, 0, :]).float().mean(1), (~level[:, :, 0]).float().mean(1)
        ratios.append(torch.stack((x, y), dim=-1))
    return torch.stack(ratios, dim=1)
