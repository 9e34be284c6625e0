"""Build Swin and ResNet backbones, for comparisons with the same necks, heads and recipes."""

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import BasicStem, ResNet
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from ..compat import feature_shape
from ..layers import channels_first
from ..layers.patch_embed import pad_to_multiple

NAMES = ("stage1", "stage2", "stage3", "stage4")


class SwinBackbone(Backbone):
    """torchvision's Swin Transformer with the outputs of :class:`FocalNet`.

    Parameters under ``features`` have torchvision's names, so its files load by identity.

    Args:
        embed_dim, depths, num_heads: as in torchvision; the defaults are those of Swin-T.
        drop_path_rate: stochastic depth probability of the last block; it increases linearly from
            0 at the first block.
        out_features: names from ``stage1`` .. ``stage4``, None for all.
    Raises: ValueError for an unknown feature.
    Source: arXiv:2103.14030; a norm on each output, as in the authors' detectors.
    """

    # Any size works: torchvision pads windows, `forward` pads patches.
    size_divisibility = 0

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        drop_path_rate: float = 0.2,
        out_features: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        unknown = set(out_features or ()) - set(NAMES)
        if unknown:
            raise ValueError(f"out_features must be some of {NAMES}, got {sorted(unknown)}.")
        self.out_features = [name for name in NAMES if name in (out_features or NAMES)]
        self.features: nn.Sequential = SwinTransformer(
            patch_size=[4, 4],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=[7, 7],
            stochastic_depth_prob=drop_path_rate,
            num_classes=1,
        ).features
        self.channels = {name: embed_dim * 2**i for i, name in enumerate(NAMES)}
        for i, name in enumerate(NAMES):
            if name in self.out_features:
                self.add_module(f"norm{i}", nn.LayerNorm(self.channels[name]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) to {name: (N, C, ceil(H / stride), ceil(W / stride))}."""
        x = self.features[0](pad_to_multiple(x, 4))
        features = {}
        for i, name in enumerate(NAMES):
            x = self.features[2 * i + 1](x)
            if name in self.out_features:
                features[name] = channels_first(getattr(self, f"norm{i}")(x))
            if i + 1 < len(NAMES):
                x = self.features[2 * i + 2](x)
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each output feature."""
        strides = {name: 4 * 2**i for i, name in enumerate(NAMES)}
        return {
            name: feature_shape(channels=self.channels[name], stride=strides[name])
            for name in self.out_features
        }


def resnet_backbone(
    *, depth: int = 50, out_features: Sequence[str] | None = None, freeze_at: int = 2
) -> ResNet:
    """Build Detectron2's ResNet for RGB images, with strides in the 3x3 convolutions.

    This is the layout of torchvision's weights. Batch norms are frozen.

    Args:
        depth: number of layers: 18, 34, 50, 101 or 152.
        out_features: names from ``res2`` .. ``res5``, None for all.
        freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and ``res2``, and so on.
    """
    return ResNet(
        BasicStem(in_channels=3, out_channels=64, norm="FrozenBN"),
        ResNet.make_default_stages(depth, stride_in_1x1=False, norm="FrozenBN"),
        out_features=list(out_features or ("res2", "res3", "res4", "res5")),
        freeze_at=freeze_at,
    )
