"""Pretrain a backbone by masked image modeling, as in SimMIM (arXiv:2111.09886)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import channels_first
from ..layers.patch_embed import pad_to_multiple
from .classifier import HeadedNetwork
from .stages import StagedBackbone


class MaskedImageModel(HeadedNetwork):
    """Reconstruct images whose masked patches were replaced by a learned token.

    The token replaces the stem's output after its norm. A 1x1 convolution and a pixel shuffle
    decode the last feature after the final norm. Images of any size are zero-padded to whole
    strides of that feature.

    Args:
        backbone: see :class:`HeadedNetwork`.
    Source: arXiv:2111.09886, section 3; transformers' FocalNetForMaskedImageModeling. The token
    begins as in microsoft/SimMIM, truncated normal with std 0.02; that of transformers is zero.
    """

    def __init__(self, backbone: StagedBackbone) -> None:
        super().__init__(backbone)
        stem = backbone.patch_embed.proj
        self.patch_size = int(stem.stride[0])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, stem.out_channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(self.channels, self.stride**2 * stem.in_channels, 1),
            nn.PixelShuffle(self.stride),
        )

    def mask_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of a mask for images of a size, pixels."""
        rows, columns = (
            math.ceil(side / self.stride) * self.stride // self.patch_size
            for side in (height, width)
        )
        return rows, columns

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct masked images.

        Args:
            x: (N, in_channels, H, W), normalized images.
            mask: bool (N, *mask_shape(H, W)), True for masked patches of the stem.
        Returns: (N, in_channels, H, W).
        Raises: ValueError for a mask of another shape.
        """
        height, width = x.shape[2:]
        expected = (x.shape[0], *self.mask_shape(height, width))
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"The mask of images {tuple(x.shape)} must be {expected}, got {tuple(mask.shape)}."
            )
        tokens = self.backbone.patch_embed(pad_to_multiple(x, self.stride))
        tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        features = self.backbone.forward_stages(self.backbone.pos_drop(tokens))
        decoded: Tensor = self.decoder(channels_first(self.normalized(features)))
        return decoded[..., :height, :width]

    def pixel_mask(self, mask: Tensor, height: int, width: int) -> Tensor:
        """Return the masked pixels, bool (N, 1, height, width), of a mask of patches."""
        pixels = mask.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)
        return pixels[:, None, :height, :width]


def masked_l1(reconstruction: Tensor, images: Tensor, pixel_mask: Tensor) -> Tensor:
    """Return the mean absolute difference of masked pixels.

    Args:
        reconstruction, images: (N, C, H, W).
        pixel_mask: bool (N, 1, H, W); pixels that are False, such as batch padding, do not count.
    Source: arXiv:2111.09886, equation 1; microsoft/SimMIM:models/simmim.py (SimMIM.forward).
    """
    difference = (reconstruction.float() - images.float()).abs() * pixel_mask
    return difference.sum() / (pixel_mask.sum() + 1e-5) / images.shape[1]


@dataclass(frozen=True, kw_only=True)
class MaskGenerator:
    """Random masks of square units.

    Attributes:
        unit: side of a unit, pixels, a multiple of the stem's stride.
        ratio: fraction of the units that are masked, 0..1; their number is rounded up.
    Raises: ValueError for values out of range.
    Source: microsoft/SimMIM:data/data_simmim.py (MaskGenerator).
    """

    unit: int = 32
    ratio: float = 0.6

    def __post_init__(self) -> None:
        if self.unit < 1 or not 0 < self.ratio <= 1:
            raise ValueError(
                f"A mask needs a unit of at least 1 px and a ratio in 0..1, got {self.unit} and "
                f"{self.ratio}."
            )

    def __call__(
        self, height: int, width: int, patch_size: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw a mask.

        Args:
            height, width: of the image, pixels.
            patch_size: stride of the stem, pixels.
            generator: on the CPU; None for PyTorch's global one.
        Returns: bool (rows, columns), a patch of the stem each, for the image padded to whole
            units.
        Raises: ValueError if units are not whole patches.
        """
        if self.unit % patch_size:
            raise ValueError(
                f"The unit of a mask, {self.unit} px, must be a multiple of the {patch_size} px "
                "patches."
            )
        rows, columns = math.ceil(height / self.unit), math.ceil(width / self.unit)
        count = math.ceil(rows * columns * self.ratio)
        units = torch.zeros(rows * columns, dtype=torch.bool)
        units[torch.randperm(rows * columns, generator=generator)[:count]] = True
        repeats = self.unit // patch_size
        grid = units.view(rows, columns)
        return grid.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1)
