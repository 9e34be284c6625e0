"""Define a bidirectional FPN on any backbone."""

from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import feature_shape
from ..layers.checks import check_integer
from ..layers.conv_gn import GROUPS, conv_gn
from .fpn import freeze_unused_norms, resolve_in_features

EXTRA_LEVELS = 2
# Keeps the normalized weights finite where all of them are zero.
EPSILON = 1e-4


class BiFPN(Backbone):
    """Bidirectional FPN with two max-pooled levels on top: stage2..stage4 become p3..p7.

    Group norms have 32 groups. The names of the parameters beside ``bottom_up`` are those of the
    published RepPoints v2.

    Args:
        bottom_up: backbone.
        in_features: names of contiguous features, fine to coarse; None or empty for all whose
            stride exceeds 4.
        out_channels: channels of every level, divisible by 32.
        repeats: number of bidirectional passes.
    Raises: ValueError for channels that are not divisible by 32, for features that the backbone
        does not have or whose strides do not double, and for other invalid values.
    Source: arXiv:1911.09070, section 3; SwinTransformer/Swin-Transformer-Object-Detection:mmdet/
    models/necks/bifpn.py.
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str] | None = None,
        out_channels: int = 256,
        repeats: int = 2,
    ) -> None:
        super().__init__()
        check_integer("out_channels", out_channels, 1, 8192)
        check_integer("repeats", repeats, 1, 100)
        if out_channels % GROUPS:
            raise ValueError(f"out_channels must be divisible by {GROUPS}, got {out_channels}.")
        shapes = bottom_up.output_shape()
        coarser = [name for name, shape in shapes.items() if shape.stride > 4]
        self.in_features = resolve_in_features(bottom_up, in_features or coarser)
        freeze_unused_norms(bottom_up, self.in_features)
        channels = [shapes[name].channels for name in self.in_features]
        channels += EXTRA_LEVELS * channels[-1:]
        finest = shapes[self.in_features[0]].stride
        self.bottom_up = bottom_up
        self.bi_fpn = nn.ModuleList(
            BidirectionalPass(channels if i == 0 else [out_channels] * len(channels), out_channels)
            for i in range(repeats)
        )
        self._strides = [finest << i for i in range(len(channels))]
        self._out_channels = out_channels

    @property
    def size_divisibility(self) -> int:
        """Stride of the coarsest feature of the backbone, to which images are padded."""
        return self._strides[-1 - EXTRA_LEVELS]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each level; the stride of ``pK`` is 2 to the power K."""
        return {
            f"p{stride.bit_length() - 1}": feature_shape(self._out_channels, stride)
            for stride in self._strides
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the levels of a batch of images.

        Args:
            x: (N, 3, H, W).
        Returns: {name: (N, C, ceil(H / stride), ceil(W / stride))}.
        """
        features = self.bottom_up(x)
        maps = [features[name] for name in self.in_features]
        for _ in range(EXTRA_LEVELS):
            maps.append(_halve(maps[-1]))
        for level in self.bi_fpn:
            maps = level(maps)
        return dict(zip(self.output_shape(), maps, strict=True))


class BidirectionalPass(nn.Module):
    """One pass from coarse to fine, and one back.

    Args:
        in_channels: channels of each level, fine to coarse.
        out_channels: channels of every level of the result.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        steps = len(in_channels) - 1
        self.lateral_convs = nn.ModuleList(
            nn.Identity()
            if channels == out_channels
            else conv_gn(channels, out_channels, 1, relu=False)
            for channels in in_channels
        )
        self.lateral_combine = nn.ModuleList(WeightedSum(2) for _ in range(steps))
        # The coarsest level has no input of its own besides the result of the first pass.
        self.out_combine = nn.ModuleList(WeightedSum(2 + (i < steps - 1)) for i in range(steps))
        self.lateral_combine_conv, self.out_combine_conv = (
            nn.ModuleList(conv_gn(out_channels, out_channels, relu=False) for _ in range(steps))
            for _ in range(2)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Mix levels (N, C_l, H_l, W_l), fine to coarse; return (N, C, H_l, W_l) of each."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        outputs = list(laterals)
        for i in reversed(range(len(maps) - 1)):
            coarse = F.interpolate(outputs[i + 1], size=outputs[i].shape[-2:], mode="nearest")
            mixed = self.lateral_combine[i]([outputs[i], coarse])
            outputs[i] = self.lateral_combine_conv[i](mixed)
        for i in range(len(maps) - 1):
            inputs = [_halve(outputs[i]), outputs[i + 1]]
            if i + 2 < len(maps):
                inputs.append(laterals[i + 1])
            outputs[i + 1] = self.out_combine_conv[i](self.out_combine[i](inputs))
        return outputs


class WeightedSum(nn.Module):
    """Sum of maps with learned, non-negative, normalized weights, followed by swish.

    Args:
        inputs: number of maps.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, 1, 1, 1, inputs))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return (N, C, H, W) of maps of that shape."""
        weights = self.weights.flatten().relu()
        weights = weights / (weights.sum() + EPSILON)
        return F.silu(sum(w * x for w, x in zip(weights, maps, strict=True)))


def _halve(x: Tensor) -> Tensor:
    """Max-pool (N, C, H, W) to (N, C, ceil(H / 2), ceil(W / 2))."""
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
