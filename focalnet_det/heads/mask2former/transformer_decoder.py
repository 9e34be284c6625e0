"""Mask2Former's transformer decoder: queries that attend within the masks they predict."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.checks import check_integer
from ..set_prediction.position_encoding import SinePositionEncoding
from ..set_prediction.query_attention import MLP, MultiheadAttention
from .pixel_decoder import DecodedPixels


class Prediction(NamedTuple):
    """Classes and masks of all queries, before or after a layer.

    Masks are kept as embeddings: most are needed at some points alone, or not at all.

    Attributes:
        class_logits: (N, Q, K + 1), "no object" last.
        mask_embedding: (N, Q, C).
        mask_features: (N, C, H, W), at stride 4, the same for all predictions.
    """

    class_logits: Tensor
    mask_embedding: Tensor
    mask_features: Tensor

    def mask_logits(self) -> Tensor:
        """Return the logits of all masks, (N, Q, H, W)."""
        return torch.einsum("nqc,nchw->nqhw", self.mask_embedding, self.mask_features)


class CrossAttentionLayer(nn.Module):
    """Masked cross-attention, residual, norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, queries: Tensor, query_position: Tensor, memory: Tensor, memory_position: Tensor,
        blocked: Tensor,
    ) -> Tensor:  # fmt: skip
        """(N, Q, C) -> (N, Q, C); memory (N, S, C), blocked bool (N, Q, S)."""
        read = self.multihead_attn(
            queries + query_position, memory + memory_position, memory, blocked
        )
        return cast(Tensor, self.norm(queries + read))


class SelfAttentionLayer(nn.Module):
    """Self-attention of the queries, residual, norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, query_position: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, C)."""
        placed = queries + query_position
        return cast(Tensor, self.norm(queries + self.self_attn(placed, placed, queries)))


class FeedForwardLayer(nn.Module):
    """Linear, ReLU, linear, residual, norm."""

    def __init__(self, channels: int, feedforward: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm = nn.LayerNorm(channels)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, C)."""
        hidden = F.relu(self.linear1(queries))
        return cast(Tensor, self.norm(queries + self.linear2(hidden)))


class MaskedTransformerDecoder(nn.Module):
    """Refine queries by masked attention to one level after the other.

    Args:
        num_classes: K.
        channels: C of the queries and of the pixel decoder's levels.
        mask_channels: of the per-pixel embeddings.
        queries: Q, most masks of an image.
        layers: of the decoder; layer i reads level i modulo the number of levels.
        levels: of the pixel decoder.
        feedforward: width of the hidden layers.
        heads: of attention.
    Source: arXiv:2112.01527, sections 3.2.1 and 3.2.2.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 256,
        mask_channels: int = 256,
        queries: int = 100,
        layers: int = 9,
        levels: int = 3,
        feedforward: int = 2048,
        heads: int = 8,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 1, 65_536)
        check_integer("queries", queries, 1, 65_536)
        check_integer("layers", layers, 1, 100)
        self.heads, self.levels = heads, levels
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(channels, heads) for _ in range(layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(channels, heads) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(channels, feedforward) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(queries, channels)
        self.query_embed = nn.Embedding(queries, channels)
        self.level_embed = nn.Embedding(levels, channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MLP(channels, channels, mask_channels, 3)
        self.position = SinePositionEncoding(channels)

    def forward(self, pixels: DecodedPixels) -> list[Prediction]:
        """Return the predictions before the first layer and after each; the last one counts."""
        memories, positions = self._memories(pixels)
        # Resizing is linear: the masks at a level's size come from the embeddings at that size.
        with torch.no_grad():
            resized = [
                F.interpolate(
                    pixels.mask_features, size=x.shape[-2:], mode="bilinear", align_corners=False
                ).float()
                for x in pixels.levels
            ]
        batch = pixels.mask_features.shape[0]
        queries = self.query_feat.weight.expand(batch, -1, -1)
        query_position = self.query_embed.weight
        predictions = [self.predict(queries, pixels.mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross_attention, self_attention, feed_forward) in enumerate(layers):
            level = i % self.levels
            padding = None if pixels.padding is None else pixels.padding[level]
            blocked = attention_mask(predictions[-1].mask_embedding, resized[level], padding)
            queries = cross_attention(
                queries, query_position, memories[level], positions[level], blocked
            )
            queries = feed_forward(self_attention(queries, query_position))
            predictions.append(self.predict(queries, pixels.mask_features))
        return predictions

    def predict(self, queries: Tensor, mask_features: Tensor) -> Prediction:
        """Predict classes and masks of queries, (N, Q, C)."""
        queries = self.decoder_norm(queries)
        return Prediction(self.class_embed(queries), self.mask_embed(queries), mask_features)

    def _memories(self, pixels: DecodedPixels) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tokens and their positions of all levels, (N, S, C) and (N or 1, S, C)."""
        memories, positions = [], []
        for i, (level, embed) in enumerate(
            zip(pixels.levels, self.level_embed.weight, strict=True)
        ):
            padding = None if pixels.padding is None else pixels.padding[i]
            size = (level.shape[-2], level.shape[-1])
            positions.append(self.position(size, padding, level.device).flatten(2).transpose(1, 2))
            memories.append(level.flatten(2).transpose(1, 2) + embed)
        return memories, positions


@torch.no_grad()
def attention_mask(
    mask_embedding: Tensor, mask_features: Tensor, padding: Tensor | None = None
) -> Tensor:
    """Return which tokens of a level each query must not read, bool (N, Q, H * W).

    A query whose mask is empty reads everything, as otherwise its attention would be NaN.

    Args:
        mask_embedding: (N, Q, C).
        mask_features: (N, C, H, W), at the size of the level, float32.
        padding: bool (N, H, W), True for cells that are never read; each image has others.
    """
    logits = mask_embedding.float() @ mask_features.flatten(2)
    outside = logits.sigmoid() < 0.5
    never = None if padding is None else padding.flatten(1)[:, None]
    if never is not None:
        outside |= never
    # Not `torch.where`, which runtimes of ONNX do not have for this dtype.
    outside &= ~outside.all(dim=-1, keepdim=True)
    return outside if never is None else outside | never
