"""UPerNet: pyramid pooling on the last stage, and an FPN whose levels are fused.

Submodules have the names of the public implementation, so that its files need a new prefix only:
``decode_head.`` becomes ``sem_seg_head.``, ``auxiliary_head.`` ``sem_seg_head.auxiliary_head.``.
Batch norms are called ``bn`` there: the published recipe exempts names with ``norm`` from weight
decay, so these are decayed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.checks import check_integer, check_integers, check_number
from ..layers.sync_batch_norm import sync_batch_norm
from .pixel_loss import PixelCrossEntropy

Features = Mapping[str, Tensor]


class ConvModule(nn.Module):
    """Convolution without bias, norm, ReLU; the size stays.

    Args:
        kernel_size: odd.
        norm: "SyncBN", or another name that Detectron2 knows.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if norm == "SyncBN":
            self.bn: nn.Module = sync_batch_norm(out_channels)
        else:
            self.bn = get_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalize and rectify a map, (N, C, H, W) -> (N, C', H, W)."""
        return F.relu(self.bn(self.conv(x)))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier: the auxiliary head.

    Args:
        dropout: probability of dropping a channel before the classifier.
    Source: arXiv:1612.01105, section 3.3 (auxiliary loss).
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, *, dropout: float, norm: str
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3, norm))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, K, H, W) of a feature (N, C, H, W)."""
        logits: Tensor = self.conv_seg(self.dropout(self.convs(x)))
        return logits


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Return a 1x1 convolution that starts with nearly equal probabilities."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetHead(nn.Module):
    """UPerNet's decoder with an auxiliary head on the last but one feature.

    Source: arXiv:1807.10221, section 3; the auxiliary head and all numbers as in
    microsoft/FocalNet:semantic_segmentation/configs/_base_/models.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: Mapping[str, ShapeSpec],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        norm: str = "SyncBN",
        loss: PixelCrossEntropy | None = None,
        loss_weight: float = 1.0,
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
    ) -> None:
        """Build the decoder.

        Args:
            input_shape: of the features to use, at least two; the order is that of their strides.
            num_classes: K.
            channels: of every level.
            pool_scales: sides of the grids that the last feature is averaged to.
            dropout: probability of dropping a channel before the classifiers.
            norm: "SyncBN", or another name that Detectron2 knows.
            loss: None for the published one.
            loss_weight: of the main loss.
            auxiliary_weight: of the auxiliary loss; 0 builds no auxiliary head.
        Raises: ValueError if there are fewer than two features, not as many class weights in the
            loss as classes, or a value is out of range.
        """
        super().__init__()
        check_integer("num_classes", num_classes, 1, 65_536)
        check_integer("channels", channels, 1, 8192)
        check_integers("pool_scales", pool_scales, 1, 64)
        check_number("dropout", dropout, 0, 1, below=True)
        check_number("loss_weight", loss_weight, 0, 1e6)
        check_integer("auxiliary_channels", auxiliary_channels, 1, 8192)
        check_number("auxiliary_weight", auxiliary_weight, 0, 1e6)
        if len(input_shape) < 2:
            raise ValueError(f"UPerNet fuses two features or more, got {list(input_shape)}.")
        self.pool_scales = tuple(pool_scales)
        self.in_features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        widths = [input_shape[name].channels for name in self.in_features]
        self.num_classes = num_classes
        self.loss = loss or PixelCrossEntropy()
        weights = self.loss.class_weights
        if weights is not None and len(weights) != num_classes:
            raise ValueError(f"{len(weights)} class weights for {num_classes} classes.")
        self.ignore_value = self.loss.ignore_value
        self.loss_weight, self.auxiliary_weight = loss_weight, auxiliary_weight
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(widths[-1], channels, 1, norm))
            for scale in pool_scales
        )
        pooled = widths[-1] + len(pool_scales) * channels
        self.bottleneck = ConvModule(pooled, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, channels, 1, norm) for width in widths[:-1]
        )
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm) for _ in widths[:-1])
        self.fpn_bottleneck = ConvModule(len(widths) * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)
        self.auxiliary_head: FCNHead | None = None
        if auxiliary_weight:
            self.auxiliary_head = FCNHead(
                widths[-2], auxiliary_channels, num_classes, dropout=dropout, norm=norm
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read ``MODEL.SEM_SEG_HEAD`` and ``MODEL.UPERNET``."""
        head, own = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.UPERNET
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "num_classes": head.NUM_CLASSES,
            "channels": head.CONVS_DIM,
            "norm": head.NORM,
            "loss": PixelCrossEntropy(
                ignore_value=head.IGNORE_VALUE,
                average=own.LOSS_AVERAGE,
                class_weights=own.CLASS_WEIGHTS or None,
                ohem_threshold=own.OHEM_THRESHOLD or None,
                ohem_min_kept=own.OHEM_MIN_KEPT,
            ),
            "loss_weight": head.LOSS_WEIGHT,
            "dropout": own.DROPOUT,
            "auxiliary_channels": own.AUXILIARY_CHANNELS,
            "auxiliary_weight": own.AUXILIARY_WEIGHT,
        }

    def forward(
        self, features: Features, targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return logits, or losses in training.

        Args:
            features: of the backbone, (N, C, H, W) each.
            targets: labels (N, H, W), in training.
        Returns: in training None and the losses; otherwise the logits (N, K, H, W) at the
            resolution of the finest feature, and no losses.
        """
        logits = self.decode(features)
        if not self.training:
            return logits, {}
        assert targets is not None
        losses = {"loss_sem_seg": self.loss(logits, targets) * self.loss_weight}
        if self.auxiliary_head is not None:
            auxiliary = self.auxiliary_head(features[self.in_features[-2]])
            losses["loss_auxiliary"] = self.loss(auxiliary, targets) * self.auxiliary_weight
        return None, losses

    def decode(self, features: Features) -> Tensor:
        """Return the logits (N, K, H, W) at the resolution of the finest feature."""
        *finer, last = (features[name] for name in self.in_features)
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.pool(last))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resized(levels[i], levels[i - 1])
        fused = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        fused.append(levels[-1])
        x = self.fpn_bottleneck(torch.cat([resized(level, fused[0]) for level in fused], dim=1))
        logits: Tensor = self.conv_seg(self.dropout(x))
        return logits

    def _learns_statistics_of_a_pixel(self) -> bool:
        """Tell whether a batch norm on one pixel an image would take its variance, which is none.

        Frozen ones, in eval mode or without statistics of the batch, only use what they have.
        """
        return any(
            norm.training
            for scale, level in zip(self.pool_scales, self.psp_modules, strict=True)
            if scale == 1
            for norm in level.modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        )

    def pool(self, x: Tensor) -> Tensor:
        """Pyramid pooling, (N, C, H, W) -> (N, channels, H, W)."""
        if len(x) == 1 and comm.get_world_size() == 1 and self._learns_statistics_of_a_pixel():
            raise ValueError(
                "UPerNet with batch norm cannot train on one image at a time: its coarsest level "
                "is a single pixel. Use a batch of 2 or more, less accumulation, frozen batch "
                'norms, or norm="GN".'
            )
        pooled = [resized(module(x), x) for module in self.psp_modules]
        out: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return out


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map bilinearly to the height and width of another."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
