"""Mask2Former's pixel decoder: a deformable encoder on strides 8 to 32, and one FPN step to 4."""

from collections.abc import Mapping
from typing import NamedTuple

from detectron2.layers import Conv2d, ShapeSpec
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.checks import check_integer
from ...ops.focal_block.policy import without_autocast
from ..set_prediction.levels import LevelEncoder, input_projection, resized_padding
from ..set_prediction.position_encoding import SinePositionEncoding


class DecodedPixels(NamedTuple):
    """Output of the pixel decoder, input of the transformer decoder.

    Attributes:
        mask_features: (N, mask channels, H / 4, W / 4), per-pixel embeddings.
        levels: (N, C, h, w) each, low resolution first.
        padding: bool (N, h, w) of each level, True in batch padding; None if it is not masked.
    """

    mask_features: Tensor
    levels: list[Tensor]
    padding: list[Tensor] | None


class PixelDecoder(nn.Module):
    """Encode the low-resolution features together, then add the highest resolution.

    Args:
        input_shape: of two features or more, of any number of channels; the one of smallest stride
            enters after the encoder.
        channels: C of all levels, a multiple of 32.
        mask_channels: of the per-pixel embeddings.
        layers: of the encoder.
        feedforward: width of the hidden layers of the encoder.
        heads: of attention.
    Raises: ValueError if there are fewer than two features.
    Source: arXiv:2112.01527, section 3.2 and appendix; facebookresearch/Mask2Former:mask2former/
    modeling/pixel_decoder/msdeformattn.py.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        channels: int = 256,
        mask_channels: int = 256,
        layers: int = 6,
        feedforward: int = 1024,
        heads: int = 8,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, 32, 8192)
        check_integer("mask_channels", mask_channels, 1, 8192)
        names = sorted(input_shape, key=lambda name: input_shape[name].stride)
        if len(names) < 2:
            raise ValueError(f"The pixel decoder needs two features or more, got {names}.")
        # Low resolution first.
        self.high_feature, self.low_features = names[0], names[:0:-1]
        self.input_proj = nn.ModuleList(
            input_projection(input_shape[name].channels, channels) for name in self.low_features
        )
        levels = len(self.low_features)
        self.transformer = LevelEncoder(channels, levels, layers, feedforward, heads)
        self.position = SinePositionEncoding(channels)
        self.adapter_1 = Conv2d(
            input_shape[self.high_feature].channels, channels, 1, bias=False,
            norm=nn.GroupNorm(32, channels),
        )  # fmt: skip
        self.layer_1 = Conv2d(
            channels, channels, 3, padding=1, bias=False,
            norm=nn.GroupNorm(32, channels), activation=F.relu,
        )  # fmt: skip
        self.mask_features = nn.Conv2d(channels, mask_channels, 1)
        for conv in (self.adapter_1, self.layer_1, self.mask_features):
            c2_xavier_fill(conv)

    def forward(
        self, features: Mapping[str, Tensor], padding: Tensor | None = None
    ) -> DecodedPixels:
        """Decode the features of a backbone, in float32 whatever autocast says.

        Args:
            features: (N, C_i, H_i, W_i) by name.
            padding: bool (N, H, W) of the images, True in batch padding, which then is neither
                read nor counted as a position; None reads it, as the published models do.
        """
        high = features[self.high_feature]
        with without_autocast(high):
            dtype = self.mask_features.weight.dtype
            maps = [
                projection(features[name].to(dtype))
                for name, projection in zip(self.low_features, self.input_proj, strict=True)
            ]
            masks = None if padding is None else [resized_padding(padding, x) for x in maps]
            positions = [
                self.position(
                    (x.shape[-2], x.shape[-1]), None if masks is None else masks[i], x.device
                )
                for i, x in enumerate(maps)
            ]
            levels = self.transformer(maps, positions, masks).maps()
            lateral = self.adapter_1(high.to(dtype))
            above = F.interpolate(
                levels[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False
            )
            fused = self.layer_1(lateral + above)
            return DecodedPixels(self.mask_features(fused), levels, masks)
