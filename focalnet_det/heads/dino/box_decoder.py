"""DINO's decoder: queries with boxes, which every layer refines."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.focal_block.policy import without_autocast
from ..set_prediction.box_numbers import inverse_sigmoid
from ..set_prediction.deformable_encoder import MultiScaleDeformableAttention
from ..set_prediction.levels import EncodedLevels
from ..set_prediction.position_encoding import encode_boxes
from ..set_prediction.query_attention import MLP, MultiheadAttention


class DecodedQueries(NamedTuple):
    """Output of the decoder.

    Attributes:
        content: (N, Q, C) after each layer, normed.
        references: (N, Q, 4), boxes cxcywh, 0..1, before the first layer and after each; the
            gradient of a reference reaches the layer that made it alone.
    """

    content: list[Tensor]
    references: list[Tensor]


class BoxDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network, norms after residuals.

    Args:
        feedforward: width of the hidden layer.
        heads: of both attentions.
        levels, points: of the cross-attention.
    """

    def __init__(
        self, channels: int, *, feedforward: int, heads: int, levels: int, points: int
    ) -> None:
        super().__init__()
        self.cross_attn = MultiScaleDeformableAttention(
            channels, heads=heads, levels=levels, points=points
        )
        self.norm1 = nn.LayerNorm(channels)
        self.self_attn = MultiheadAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm3 = nn.LayerNorm(channels)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        references: Tensor,
        memory: EncodedLevels,
        blocked: Tensor | None,
    ) -> Tensor:
        """(N, Q, C) -> (N, Q, C).

        Args:
            position: (N, Q, C).
            references: (N, Q, L, 4), boxes cxcywh relative to each level with its padding.
            blocked: bool (Q, Q), True where a query must not read another.
        """
        placed = queries + position
        queries = self.norm2(queries + self.self_attn(placed, placed, queries, blocked))
        read = self.cross_attn(
            queries + position, references, memory.tokens, memory.shapes, memory.padding
        )
        queries = self.norm1(queries + read)
        hidden = self.linear2(F.relu(self.linear1(queries)))
        return cast(Tensor, self.norm3(queries + hidden))


class BoxDecoder(nn.Module):
    """Layers that refine queries, and the boxes that they read around.

    Args:
        layers: how many.
        feedforward, heads, levels, points: of `BoxDecoderLayer`.
    Source: arXiv:2203.03605, section 3.5 (look forward twice).
    """

    def __init__(
        self,
        channels: int,
        layers: int,
        *,
        feedforward: int,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            BoxDecoderLayer(
                channels, feedforward=feedforward, heads=heads, levels=levels, points=points
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.ref_point_head = MLP(2 * channels, channels, channels, 2)

    def forward(
        self,
        queries: Tensor,
        boxes: Tensor,
        memory: EncodedLevels,
        box_heads: Sequence[nn.Module],
        blocked: Tensor | None = None,
    ) -> DecodedQueries:
        """Decode queries.

        Args:
            queries: (N, Q, C), content.
            boxes: (N, Q, 4), logits of cxcywh, detached.
            box_heads: of each layer.
            blocked: bool (Q, Q), True where a query must not read another.
        """
        ratios = memory.valid_ratios
        scale = boxes.new_ones(1, 1, 1, 4)
        if ratios is not None:
            scale = torch.cat((ratios, ratios), dim=-1)[:, None]
        scale = scale.expand(-1, -1, len(memory.shapes), -1)
        reference = boxes.sigmoid()
        content, references = [], [reference]
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            references_by_level = reference[:, :, None] * scale
            encoded = encode_boxes(references_by_level[:, :, 0], queries.shape[-1] // 2)
            position = self.ref_point_head(encoded)
            queries = layer(queries, position, references_by_level, memory, blocked)
            refined = refine_boxes(box_head, queries, reference)
            reference = refined.detach()
            references.append(refined)
            content.append(self.norm(queries))
        return DecodedQueries(content, references)


def refine_boxes(box_head: nn.Module, queries: Tensor, reference: Tensor) -> Tensor:
    """Move boxes by what a box head predicts, (N, Q, 4), cxcywh, 0..1, float32 always.

    Args:
        queries: (N, Q, C).
        reference: (N, Q, 4), boxes to move.
    """
    # Half precision would move boxes of large images by pixels.
    with without_autocast(queries):
        shift = box_head(queries.float())
        return (shift + inverse_sigmoid(reference)).sigmoid()
