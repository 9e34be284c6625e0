"""Sine position encoding of feature maps."""

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Encode the row and the column of each cell by sines and cosines of falling frequency.

    Args:
        channels: C of the encoding, a multiple of 4; the first half is of the row.
        temperature: of the frequencies; 10000 in Mask2Former and detrex, 20 in the official DINO.
            It belongs to a checkpoint: no shape of a tensor shows it.
        offset: added to the position of a cell before it is normalized; -0.5 in detrex, where the
            positions are those of the centers.
    Raises: ValueError if ``channels`` is not a multiple of 4.
    Source: arXiv:2005.12872, appendix A.4.
    """

    def __init__(self, channels: int, *, temperature: float = 10_000.0, offset: float = 0.0):
        super().__init__()
        if channels % 4 or channels <= 0:
            raise ValueError(f"channels must be a positive multiple of 4, got {channels}.")
        self.channels, self.temperature, self.offset = channels, temperature, offset

    def forward(
        self, size: tuple[int, int], padding: Tensor | None, device: torch.device
    ) -> Tensor:
        """Return the encoding of a map, (N, C, H, W), or (1, C, H, W) without padding.

        Args:
            size: (H, W), cells.
            padding: bool (N, H, W), True where a cell is padding; positions are relative to the
                area without padding. None for a map without any.
        """
        cells = torch.ones(1, *size, device=device) if padding is None else (~padding).float()
        rows, columns = (self._angles(cells.cumsum(axis), axis) for axis in (1, 2))
        return torch.cat((rows, columns), dim=3).permute(0, 3, 1, 2)

    def _angles(self, position: Tensor, axis: int) -> Tensor:
        """Return sines and cosines of positions along an axis, (N, H, W) -> (N, H, W, C / 2)."""
        last = position.narrow(axis, position.shape[axis] - 1, 1)
        position = (position + self.offset) / (last + 1e-6) * (2 * math.pi)
        half = self.channels // 2
        number = torch.arange(half, device=position.device).div(2, rounding_mode="floor")
        angle = position[..., None] / self.temperature ** (2 * number.float() / half)
        return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3)


def encode_boxes(boxes: Tensor, channels: int) -> Tensor:
    """Encode the numbers of boxes by sines and cosines, (N, Q, 4) -> (N, Q, 4 * channels).

    The temperature is 10000; the order of the numbers is y, x, w, h.

    Args:
        boxes: cxcywh, 0..1.
        channels: of each number, even.
    Source: arXiv:2201.12329, section 3.3 and appendix.
    """
    number = torch.arange(channels, device=boxes.device).div(2, rounding_mode="floor")
    angle = boxes[..., [1, 0, 2, 3], None] * (2 * math.pi) / 10_000 ** (2 * number / channels)
    both = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1)
    return both.flatten(2)
