"""Sparse R-CNN, as published for FocalNet and Focal Transformer."""

from detectron2.config import LazyCall as L

from focalnet_det.heads.sparse_rcnn import sparse_rcnn as build_sparse_rcnn
from focalnet_det.necks.fpn import build_fpn

from .backbones import backbone_of


def sparse_rcnn(name, *, num_classes=80, proposals=300, drop_path_rate=0.3, **backbone):
    """Sparse R-CNN on a backbone by name; further arguments go to the backbone."""
    return L(build_sparse_rcnn)(
        backbone=L(build_fpn)(
            bottom_up=backbone_of(name, drop_path_rate=drop_path_rate, **backbone),
            out_channels=256,
            norm="",
        ),
        num_classes=num_classes,
        proposals=proposals,
        initial_box="image",
        stages=6,
        dynamic_channels=64,
        feedforward=2048,
        heads=8,
        resolution=7,
        sampling_ratio=2,
        canonical_box_size=224,
        max_detections_per_image=proposals,
    )


def nano_sparse_rcnn(*, proposals=50, **options):
    """A small one for machines without a GPU: few narrow stages, small objects."""
    model = sparse_rcnn("focalnet_nano", proposals=proposals, drop_path_rate=0.0, **options)
    model.backbone.update(out_channels=64, norm="GN")
    model.update(
        initial_box="grid",
        stages=3,
        dynamic_channels=16,
        feedforward=256,
        heads=4,
        canonical_box_size=112,
        max_detections_per_image=100,
    )
    return model
