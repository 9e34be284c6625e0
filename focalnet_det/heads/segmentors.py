"""Build segmentors on any backbone, with channels from its ``output_shape()``."""

from collections.abc import Sequence
from typing import Any

from detectron2.modeling import Backbone

from .empty import FiniteSemSegFPNHead
from .mmdet.segmentor import MmsegSegmentor
from .pixel_loss import IGNORED_LABEL, PixelCrossEntropy
from .upernet import UPerNetHead

# ImageNet statistics, RGB, 0..255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def upernet(
    *,
    backbone: Backbone,
    num_classes: int,
    channels: int = 512,
    auxiliary_channels: int = 256,
    norm: str = "SyncBN",
    dropout: float = 0.1,
    loss: PixelCrossEntropy | None = None,
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
    **inference: Any,
) -> MmsegSegmentor:
    """Build UPerNet on all features of a backbone.

    Args:
        backbone: backbone with at least two features.
        num_classes, channels, auxiliary_channels, norm, dropout, loss: see :class:`UPerNetHead`.
        pixel_mean, pixel_std: RGB, 0..255.
        inference: ``train_size``, ``window`` and ``window_stride`` of :class:`MmsegSegmentor`.
    Raises: ValueError as :class:`UPerNetHead` and :class:`MmsegSegmentor`.
    Source: arXiv:1807.10221, section 3.
    """
    head = UPerNetHead(
        input_shape=backbone.output_shape(),
        num_classes=num_classes,
        channels=channels,
        auxiliary_channels=auxiliary_channels,
        norm=norm,
        dropout=dropout,
        loss=loss,
    )
    return MmsegSegmentor(
        backbone=backbone,
        sem_seg_head=head,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        **inference,
    )


def semantic_fpn(
    *,
    backbone: Backbone,
    num_classes: int,
    in_features: Sequence[str] = ("p2", "p3", "p4", "p5"),
    channels: int = 128,
    norm: str = "GN",
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
    **inference: Any,
) -> MmsegSegmentor:
    """Build semantic FPN: Detectron2's head on an FPN.

    Args:
        backbone: FPN.
        num_classes: number of classes.
        in_features: names of the FPN's features that the head uses.
        channels: channels of the head's convolutions.
        norm: norm of the head's convolutions, as in Detectron2's ``get_norm``.
        pixel_mean, pixel_std, inference: see :func:`upernet`.
    Raises: ValueError as :class:`MmsegSegmentor`.
    Source: arXiv:1901.02446, section 3 (semantic segmentation branch).
    """
    shapes = backbone.output_shape()
    head = FiniteSemSegFPNHead(
        {name: shapes[name] for name in in_features},
        num_classes=num_classes,
        conv_dims=channels,
        common_stride=4,
        norm=norm,
        ignore_value=IGNORED_LABEL,
    )
    return MmsegSegmentor(
        backbone=backbone,
        sem_seg_head=head,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        **inference,
    )
