"""Define ATSS's head."""

from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from torch import Tensor, nn

from ..dense import head_norm


class ATSSHead(FCOSHead):
    """FCOS's head, with a learned factor on the box deltas of each level.

    With a norm, the convolutions before the last ones have no bias, as in mmdet; Detectron2's have.

    Args:
        input_shape: shape of each level; their channels must agree.
        num_classes: K.
        conv_dims: output channels of the convolutions before the last ones.
        norm: as in Detectron2's ``get_norm``; "" for none.
        prior_prob: initial score of every class.
    Source: arXiv:1912.02424, section 4; open-mmlab/mmdetection:mmdet/models/dense_heads/
    atss_head.py.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        conv_dims: Sequence[int],
        norm: str = "GN",
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__(
            input_shape=list(input_shape),
            num_classes=num_classes,
            conv_dims=list(conv_dims),
            norm=head_norm(norm),
            prior_prob=prior_prob,
        )
        self.scales = nn.ModuleList(LevelScale() for _ in input_shape)
        for layer in (*self.cls_subnet, *self.bbox_subnet):
            if norm and isinstance(layer, nn.Conv2d):
                layer.register_parameter("bias", None)

    def forward(
        self, features: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Predict for all levels.

        Args:
            features: (N, C, H, W) of each level.
        Returns: class logits (N, K, H, W), box deltas (N, 4, H, W) and centerness logits
            (N, 1, H, W) of each level.
        """
        logits, deltas, centerness = super().forward(features)
        scaled = [scale(level) for scale, level in zip(self.scales, deltas, strict=True)]
        return logits, scaled, centerness


class LevelScale(nn.Module):
    """Multiply by a learned scalar, initially 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the scalar, same shape."""
        return x * self.scale
