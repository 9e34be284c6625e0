"""Do per-pixel work in tiles that stay in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Pixels of a tile: at 96 channels, 0.75 MiB per tensor and four times that for the MLP.
TILE = 2048

Tile = tuple[slice, slice]


def tiles(x: Tensor) -> Iterator[Tile]:
    """Index ranges of (N, P, C) that cover N and P: parts of one image, or several whole ones."""
    images, pixels = x.shape[:2]
    if pixels > TILE:
        for image in range(images):
            for first in range(0, pixels, TILE):
                yield slice(image, image + 1), slice(first, first + TILE)
    elif pixels:
        count = max(1, TILE // pixels)
        for image in range(0, images, count):
            yield slice(image, image + count), slice(None)


def rows(x: Tensor) -> Tensor:
    """Return (N, P, C) as (N * P, C), a view where the memory allows it, as in every tile."""
    return x.reshape(-1, x.shape[-1])


def global_context(total: Tensor, area: Tensor | int) -> Tensor:
    """Turn (N, C) sums over the pixels into (N, 1, C) global contexts."""
    return torch.nn.functional.gelu(total / area)[:, None]
