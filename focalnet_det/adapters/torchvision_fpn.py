"""Build backbones for torchvision's detectors: features by name, and ``out_channels``."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from ..backbones import StagedBackbone
from ..create import create_backbone

# First stage that a detector reads, by the levels on top of the FPN.
FIRST_STAGES = {"pool": 1, "p6p7": 2}


class TorchvisionBackbone(nn.Module):
    """A backbone with torchvision's FPN, as torchvision's detectors take it.

    Args:
        body: backbone.
        out_channels: channels of all levels.
        extra_blocks: adds levels on top, None for none.
    """

    def __init__(
        self, body: StagedBackbone, *, out_channels: int = 256, extra_blocks: ExtraFPNBlock | None
    ) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        channels = [shape.channels for shape in body.output_shape().values()]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, C, H, W) to levels named "0", "1", ..., and "pool" or "p6" and "p7"."""
        maps = self.body(images).values()
        levels: dict[str, Tensor] = self.fpn({str(i): map for i, map in enumerate(maps)})
        return levels


def torchvision_backbone(
    name: str,
    *,
    top: str = "pool",
    out_channels: int = 256,
    weights: str | Path | None = None,
    **overrides: Any,
) -> TorchvisionBackbone:
    """Build a backbone with FPN for a detector of torchvision.

    The detectors normalize with ImageNet's statistics, as our backbones expect, and take RGB.

    Example::

        backbone = torchvision_backbone("focalnet_tiny_lrf", weights="focalnet_tiny_lrf.pth")
        model = torchvision.models.detection.MaskRCNN(backbone, num_classes=91)

    Args:
        name: variant, see :func:`focalnet_det.list_backbones`.
        top: "pool" for ``FasterRCNN`` and ``MaskRCNN``, which read strides 4 to 64; "p6p7" for
            ``RetinaNet`` and ``FCOS``, which read strides 8 to 128.
        out_channels: channels of all levels.
        weights, overrides: as in :func:`focalnet_det.create_backbone`.
    Raises: ValueError for an unknown ``top``, and the errors of ``create_backbone``.
    """
    if top not in FIRST_STAGES:
        raise ValueError(f"Unknown top {top!r}. Known: {', '.join(FIRST_STAGES)}.")
    names = tuple(f"stage{k}" for k in range(FIRST_STAGES[top], 5))
    overrides.setdefault("out_features", names)
    body = create_backbone(name, weights=weights, **overrides)
    extra: ExtraFPNBlock = LastLevelMaxPool()
    if top == "p6p7":
        extra = LastLevelP6P7(out_channels, out_channels)
    return TorchvisionBackbone(body, out_channels=out_channels, extra_blocks=extra)
