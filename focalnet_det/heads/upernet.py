"""Define UPerNet: pyramid pooling on the last stage, and an FPN whose levels are fused.

Submodules have the names of mmsegmentation, so its files need only another prefix: ``decode_head.``
becomes ``sem_seg_head.``, and ``auxiliary_head.`` becomes ``sem_seg_head.auxiliary_head.``. Batch
norms are named ``bn``, as there, so the published recipe, which exempts names with ``norm`` from
weight decay, decays them.
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
from ..ops.focal_block.policy import is_tracing
from .pixel_loss import PixelCrossEntropy

Features = Mapping[str, Tensor]


class ConvModule(nn.Module):
    """Convolution without bias, norm, ReLU, with "same" padding.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel_size: odd.
        norm: "SyncBN", or another norm of Detectron2's ``get_norm``.
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
        """Transform a feature map, (N, in_channels, H, W) -> (N, out_channels, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class FCNHead(nn.Module):
    """Auxiliary head: a 3x3 convolution and a classifier.

    Args:
        in_channels: channels of the feature.
        channels: channels of the convolution.
        num_classes: K.
        dropout: probability of dropping a channel before the classifier.
        norm: see :class:`ConvModule`.
    Source: arXiv:1612.01105, section 3.3 (auxiliary loss).
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, *, dropout: float, norm: str
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3, norm))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = build_classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Predict logits (N, K, H, W) from a feature (N, C, H, W)."""
        logits: Tensor = self.conv_seg(self.dropout(self.convs(x)))
        return logits


def build_classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Build a 1x1 convolution whose initial class probabilities are nearly equal."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetHead(nn.Module):
    """UPerNet's decoder, with an auxiliary head on the second-to-last feature.

    Args:
        input_shape: shapes of the features to use, at least two.
        num_classes: K.
        channels: channels of every level.
        pool_scales: sides of the grids that the last feature is pooled to.
        dropout: probability of dropping a channel before the classifiers.
        norm: see :class:`ConvModule`.
        loss: loss of both heads; None for the published one.
        loss_weight: weight of the main loss.
        auxiliary_channels: channels of the auxiliary head.
        auxiliary_weight: weight of the auxiliary loss; 0 builds no auxiliary head.
    Raises: ValueError if there are fewer than two features, if the loss has another number of
        class weights than classes, or if a value is out of range.
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
        super().__init__()
        check_integer("num_classes", num_classes, 1, 65_536)
        check_integer("channels", channels, 1, 8192)
        check_integers("pool_scales", pool_scales, 1, 64)
        check_number("dropout", dropout, 0, 1, below=True)
        check_number("loss_weight", loss_weight, 0, 1e6)
        check_integer("auxiliary_channels", auxiliary_channels, 1, 8192)
        check_number("auxiliary_weight", auxiliary_weight, 0, 1e6)
        if len(input_shape) < 2:
            raise ValueError(f"UPerNet needs at least two features, got {list(input_shape)}.")
        self.pool_scales = tuple(pool_scales)
        self.in_features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        widths = [input_shape[name].channels for name in self.in_features]
        self.num_classes = num_classes
        self.loss = loss or PixelCrossEntropy()
        self.loss.check_classes(num_classes)
        self.ignore_value = self.loss.ignore_value
        self.loss_weight, self.auxiliary_weight = loss_weight, auxiliary_weight
        self._build_decoder(widths, channels, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = build_classifier(channels, num_classes)
        self.auxiliary_head: FCNHead | None = None
        if auxiliary_weight:
            self.auxiliary_head = FCNHead(
                widths[-2], auxiliary_channels, num_classes, dropout=dropout, norm=norm
            )

    def _build_decoder(self, widths: Sequence[int], channels: int, norm: str) -> None:
        """Add the pyramid pooling module and the FPN on features of ``widths`` channels."""
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(widths[-1], channels, 1, norm))
            for scale in self.pool_scales
        )
        pooled = widths[-1] + len(self.pool_scales) * channels
        self.bottleneck = ConvModule(pooled, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, channels, 1, norm) for width in widths[:-1]
        )
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm) for _ in widths[:-1])
        self.fpn_bottleneck = ConvModule(len(widths) * channels, channels, 3, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read ``MODEL.SEM_SEG_HEAD`` and ``MODEL.UPERNET``."""
        head, upernet = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.UPERNET
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "num_classes": head.NUM_CLASSES,
            "channels": head.CONVS_DIM,
            "norm": head.NORM,
            "loss": PixelCrossEntropy(
                ignore_value=head.IGNORE_VALUE,
                average=upernet.LOSS_AVERAGE,
                class_weights=upernet.CLASS_WEIGHTS or None,
                ohem_threshold=upernet.OHEM_THRESHOLD or None,
                ohem_min_kept=upernet.OHEM_MIN_KEPT,
            ),
            "loss_weight": head.LOSS_WEIGHT,
            "dropout": upernet.DROPOUT,
            "auxiliary_channels": upernet.AUXILIARY_CHANNELS,
            "auxiliary_weight": upernet.AUXILIARY_WEIGHT,
        }

    def forward(
        self, features: Features, targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Predict logits, or compute losses in training.

        Args:
            features: features of the backbone by name, (N, C, H, W) each.
            targets: labels (N, H, W), int64; required in training.
        Returns: None and the losses in training; otherwise the logits (N, K, H, W) at the
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
        """Predict logits (N, K, H, W) at the resolution of the finest feature."""
        *finer, last = (features[name] for name in self.in_features)
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.pool(last))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize_like(levels[i], levels[i - 1])
        fused = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        fused.append(levels[-1])
        x = self.fpn_bottleneck(torch.cat([resize_like(level, fused[0]) for level in fused], dim=1))
        logits: Tensor = self.conv_seg(self.dropout(x))
        return logits

    def _normalizes_single_pixels(self) -> bool:
        """Tell whether a batch norm would compute statistics of a single pixel per image.

        Batch norms that are frozen or in eval mode use their running statistics instead.
        """
        return any(
            norm.training
            for scale, level in zip(self.pool_scales, self.psp_modules, strict=True)
            if scale == 1
            for norm in level.modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        )

    def pool(self, x: Tensor) -> Tensor:
        """Apply pyramid pooling, (N, C, H, W) -> (N, channels, H, W).

        Raises: ValueError if a batch norm would have to normalize a single pixel.
        """
        # The sizes come last: a graph is recorded in eval mode, for any size.
        if self._normalizes_single_pixels() and len(x) == 1 and comm.get_world_size() == 1:
            raise ValueError(
                "UPerNet with batch norm cannot train on one image at a time, because its coarsest "
                "level is a single pixel. Use a batch size of at least 2, less accumulation, "
                'frozen batch norms, or norm="GN".'
            )
        pooled = [resize_like(module(x), x) for module in self.psp_modules]
        out: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return out


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Resize a map (N, C, h, w) bilinearly to the height and width of another (N, C', H, W)."""
    # A graph must not depend on the size it was recorded with.
    recording = torch.compiler.is_compiling() or is_tracing()
    if not recording and x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
