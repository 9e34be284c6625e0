"""Panoptic FPN: Mask R-CNN with Detectron2's semantic head on the same features."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import PanopticFPN

from focalnet_det.heads.empty import FiniteSemSegFPNHead

from .mask_rcnn import LEVELS, mask_rcnn, nano_mask_rcnn


def panoptic_fpn(variant, *, num_stuff=54, **changes):
    """Panoptic FPN on a FocalNet variant, in Detectron2's sizes.

    num_stuff: classes of the semantic head, the one that stands for all things included.
    changes: arguments of mask_rcnn, or of the backbone.
    """
    return add_semantic_head(mask_rcnn(variant, **changes), num_stuff=num_stuff)


def nano_panoptic_fpn(*, num_stuff, stuff_area, **changes):
    """A small one for machines without a GPU; arguments as above.

    stuff_area: smaller areas of a class of stuff are left void, pixels.
    """
    model = nano_mask_rcnn(**changes)
    model = add_semantic_head(model, num_stuff=num_stuff, channels=64)
    model.combine_stuff_area_thresh = stuff_area
    return model


def add_semantic_head(model, *, num_stuff, channels=128):
    """Turns a Mask R-CNN into a panoptic FPN; channels: of the semantic head."""
    model._target_ = PanopticFPN
    width = model.backbone.out_channels
    model.sem_seg_head = L(FiniteSemSegFPNHead)(
        input_shape={
            level: L(ShapeSpec)(channels=width, stride=4 * 2**k) for k, level in enumerate(LEVELS)
        },
        num_classes=num_stuff,
        conv_dims=channels,
        common_stride=4,
        loss_weight=0.5,
        norm="GN",
        ignore_value=255,
    )
    model.combine_overlap_thresh = 0.5
    model.combine_stuff_area_thresh = 4096
    model.combine_instances_score_thresh = 0.5
    return model
