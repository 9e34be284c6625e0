"""UPerNet and semantic FPN."""

from detectron2.config import LazyCall as L

from focalnet_det.heads.pixel_loss import PixelCrossEntropy
from focalnet_det.heads.segmentors import semantic_fpn as build_semantic_fpn
from focalnet_det.heads.segmentors import upernet as build_upernet
from focalnet_det.necks.fpn import build_fpn

from .backbones import backbone_of


def upernet(name, *, num_classes=150, channels=512, crop=512, **backbone):
    """UPerNet on a backbone by name, as published; further arguments go to the backbone.

    crop: side of the training crops, pixels; smaller batches are padded to it.
    """
    return L(build_upernet)(
        backbone=backbone_of(name, **backbone),
        num_classes=num_classes,
        channels=channels,
        auxiliary_channels=channels // 2,
        norm="SyncBN",
        loss=L(PixelCrossEntropy)(
            average="all", class_weights=None, ohem_threshold=None, ohem_min_kept=100_000
        ),
        train_size=(crop, crop),
        window=None,
        window_stride=None,
    )


def semantic_fpn(name, *, num_classes=150, channels=256, head_channels=128, crop=512, **backbone):
    """Semantic FPN with Detectron2's head; arguments as in upernet."""
    return L(build_semantic_fpn)(
        backbone=L(build_fpn)(
            bottom_up=backbone_of(name, **backbone),
            out_channels=channels,
            norm="",
        ),
        num_classes=num_classes,
        channels=head_channels,
        norm="GN",
        train_size=(crop, crop),
        window=None,
        window_stride=None,
    )
