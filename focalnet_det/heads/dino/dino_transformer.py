"""DINO's transformer: encoder, selection of queries among its tokens, decoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers.checks import check_integer
from ...ops.focal_block.policy import without_autocast
from ..set_prediction.box_matching import BoxPrediction
from ..set_prediction.levels import EncodedLevels, LevelEncoder
from ..set_prediction.query_attention import MLP
from .box_decoder import BoxDecoder, DecodedQueries


class Selection(NamedTuple):
    """Tokens that become queries, in the order of their score.

    Attributes:
        tokens: int64 (N, Q), numbers of the tokens.
        prediction: of these tokens.
        boxes: (N, Q, 4), logits of their boxes, detached.
    """

    tokens: Tensor
    prediction: BoxPrediction
    boxes: Tensor


class DINOTransformer(LevelEncoder):
    """Encode all levels, select the best tokens as boxes of the queries, decode.

    Args:
        num_classes: K, rows of the class layer.
        channels: C.
        queries: Q, most boxes of an image; images of fewer tokens have as many queries as tokens.
        encoder_layers, decoder_layers: numbers of layers.
        levels: of the neck.
        feedforward: width of the hidden layers.
        heads: of attention.
    Source: arXiv:2203.03605, sections 3.4 and 3.5; FocalNet/FocalNet-DINO:models/dino/
    deformable_transformer.py.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 256,
        queries: int = 900,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        levels: int = 4,
        feedforward: int = 2048,
        heads: int = 8,
    ) -> None:
        check_integer("queries", queries, 1, 65_536)
        check_integer("encoder_layers", encoder_layers, 1, 100)
        check_integer("decoder_layers", decoder_layers, 1, 100)
        check_integer("feedforward", feedforward, 1, 1_000_000)
        super().__init__(channels, levels, encoder_layers, feedforward, heads)
        self.decoder = BoxDecoder(
            channels, decoder_layers, feedforward=feedforward, heads=heads, levels=levels
        )
        self.tgt_embed = nn.Embedding(queries, channels)
        self.enc_output = nn.Linear(channels, channels)
        self.enc_output_norm = nn.LayerNorm(channels)
        self.enc_out_class_embed = class_layer(channels, num_classes)
        self.enc_out_bbox_embed = box_layers(channels)
        for weight in (self.tgt_embed.weight, self.enc_output.weight):
            nn.init.xavier_uniform_(weight)
        for layer in self.decoder.ref_point_head.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)

    def encode(
        self, maps: Sequence[Tensor], positions: Sequence[Tensor], padding: Sequence[Tensor]
    ) -> EncodedLevels:
        """Return the encoded tokens; arguments as in `LevelEncoder`."""
        encoded: EncodedLevels = self(maps, positions, padding)
        return encoded

    def select(self, memory: EncodedLevels) -> Selection:
        """Select the tokens whose best class has the highest logit.

        Tokens in padding, and those whose proposal comes near the border of the image, rank with
        what a token of zeros would have.
        """
        with without_autocast(memory.tokens):
            proposals, usable = box_proposals(memory)
            tokens = memory.tokens.float() * usable[..., None]
            tokens = self.enc_output_norm(self.enc_output(tokens))
            logits = self.enc_out_class_embed(tokens)
            count = min(self.tgt_embed.num_embeddings, logits.shape[1])
            chosen = logits.detach().max(-1).values.topk(count, dim=1).indices

            def gather(x: Tensor) -> Tensor:
                return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))

            boxes = self.enc_out_bbox_embed(gather(tokens)) + gather(proposals)
            prediction = BoxPrediction(gather(logits), boxes.sigmoid())
        return Selection(chosen, prediction, boxes.detach())

    def decode(
        self,
        selection: Selection,
        memory: EncodedLevels,
        box_heads: Sequence[nn.Module],
        denoising: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> DecodedQueries:
        """Decode the queries, whose content is learned, by rank.

        Args:
            box_heads: of each decoder layer.
            denoising: content (N, W, C) and logits of boxes (N, W, 4) of further queries, which
                come first, and which queries must not read which, bool (W + Q, W + Q).
        """
        batch, count = selection.tokens.shape
        content = self.tgt_embed.weight[:count].expand(batch, -1, -1)
        boxes, blocked = selection.boxes, None
        if denoising is not None:
            content = torch.cat((denoising[0].to(content.dtype), content), dim=1)
            boxes = torch.cat((denoising[1], boxes), dim=1)
            blocked = denoising[2]
        decoded: DecodedQueries = self.decoder(content, boxes, memory, box_heads, blocked)
        return decoded


def box_proposals(memory: EncodedLevels) -> tuple[Tensor, Tensor]:
    """Return a box around each token, and which tokens can be used.

    The box is as wide and high as 0.05 of the image, doubled with each level.

    Returns: logits of cxcywh, (N, S, 4), infinite for tokens that cannot be used; bool (N, S).
    """
    tokens, device = memory.tokens, memory.tokens.device
    boxes = []
    for i, (height, width) in enumerate(memory.shapes):
        y, x = torch.meshgrid(
            (torch.arange(height, device=device) + 0.5) / max(height, 1),
            (torch.arange(width, device=device) + 0.5) / max(width, 1),
            indexing="ij",
        )
        center = torch.stack((x, y), dim=-1).view(1, -1, 2).expand(len(tokens), -1, -1)
        if memory.valid_ratios is not None:
            center = center / memory.valid_ratios[:, i, None]
        boxes.append(torch.cat((center, torch.full_like(center, 0.05 * 2**i)), dim=-1))
    proposals = torch.cat(boxes, dim=1)
    usable = ((proposals > 0.01) & (proposals < 0.99)).all(-1)
    if memory.padding is not None:
        usable &= ~memory.padding
    logits = (proposals / (1 - proposals)).log()
    return logits.masked_fill(~usable[..., None], torch.inf), usable


def class_layer(channels: int, num_classes: int) -> nn.Linear:
    """Return a class layer whose classes have a probability of 0.01 at first."""
    layer = nn.Linear(channels, num_classes)
    nn.init.constant_(layer.bias, -4.59511985013459)  # -log(99)
    return layer


def box_layers(channels: int) -> MLP:
    """Return box layers that move no box at first."""
    layers = MLP(channels, channels, 4, 3)
    last = layers.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return layers
