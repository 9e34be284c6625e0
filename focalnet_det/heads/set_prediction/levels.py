"""Feature maps of several levels as one sequence of tokens, and their deformable encoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.deformable_attention import Shapes
from .deformable_encoder import DeformableEncoder, cell_centers, valid_parts


class EncodedLevels(NamedTuple):
    """Output of the encoder.

    Attributes:
        tokens: (N, S, C), of all levels, row by row.
        shapes: (height, width) of each level.
        padding: bool (N, S), True in batch padding; None if it is not masked.
        valid_ratios: (N, L, 2: x, y), part of each level that is not padding; None for all of it.
    """

    tokens: Tensor
    shapes: Shapes
    padding: Tensor | None
    valid_ratios: Tensor | None

    def maps(self) -> list[Tensor]:
        """Return the tokens of each level as a map, (N, C, h, w)."""
        split = self.tokens.split([height * width for height, width in self.shapes], dim=1)
        return [
            x.transpose(1, 2).unflatten(2, shape)
            for x, shape in zip(split, self.shapes, strict=True)
        ]


class LevelEncoder(nn.Module):
    """A deformable encoder over the tokens of all levels, with an embedding of each level.

    Args:
        levels: number of levels.
        layers: of the encoder.
        feedforward: width of the hidden layers.
        heads: of attention.
    """

    def __init__(
        self, channels: int, levels: int, layers: int, feedforward: int, heads: int
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(levels, channels))
        self.encoder = DeformableEncoder(
            channels, layers, feedforward=feedforward, heads=heads, levels=levels
        )

    def forward(
        self, maps: Sequence[Tensor], positions: Sequence[Tensor], padding: Sequence[Tensor] | None
    ) -> EncodedLevels:
        """Encode maps, (N, C, h, w) each.

        Args:
            positions: (N or 1, C, h, w) each.
            padding: bool (N, h, w) each.
        """
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        tokens = torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)
        embedded = [
            x.flatten(2).transpose(1, 2) + embed
            for x, embed in zip(positions, self.level_embed, strict=True)
        ]
        position = torch.cat(embedded, dim=1)
        ratios = None if padding is None else valid_parts(padding)
        references = cell_centers(shapes, ratios, tokens.device)
        masked = None if padding is None else torch.cat([x.flatten(1) for x in padding], dim=1)
        tokens = self.encoder(tokens, position, references, shapes, masked)
        return EncodedLevels(tokens, shapes, masked, ratios)


def input_projection(
    in_channels: int, channels: int, *, kernel_size: int = 1, stride: int = 1
) -> nn.Sequential:
    """Return a convolution and a group norm, (N, C_i, H, W) -> (N, C, ceil(H / stride), ...)."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.GroupNorm(32, channels))


def resized_padding(padding: Tensor, feature: Tensor) -> Tensor:
    """Return which cells of a map are padding: bool (N, H, W) -> (N, h, w), nearest pixels."""
    resized = F.interpolate(padding[:, None].float(), size=feature.shape[-2:], mode="nearest")
    return resized[:, 0].bool()


def padding_masks(
    sizes: Sequence[tuple[int, int]], padded: tuple[int, int], device: torch.device
) -> Tensor:
    """Return which pixels of a batch are padding, bool (N, *padded).

    Args:
        sizes, padded: (height, width), pixels, of the images and of the batch.
    """
    masks = torch.ones(len(sizes), *padded, dtype=torch.bool, device=device)
    for mask, (height, width) in zip(masks, sizes, strict=True):
        mask[:height, :width] = False
    return masks
