"""Faster and Mask R-CNN with FPN, as Detectron2 and the published FocalNet recipe have them."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)

from focalnet_det.heads.empty import EmptyImageROIHeads
from focalnet_det.heads.mmdet.conventions import MmdetBox2BoxTransform, MmdetMatcher, MmdetRPN
from focalnet_det.heads.mmdet.rcnn import MmdetRCNN
from focalnet_det.heads.poolers import FastROIPooler
from focalnet_det.necks.fpn import build_fpn

from .backbones import backbone_of

LEVELS = ("p2", "p3", "p4", "p5")


def mask_rcnn(
    name,
    *,
    num_classes=80,
    channels=256,
    norm="",
    fc_dim=1024,
    mask_convs=4,
    anchor_size=32,
    rois=512,
    proposals=1000,
    detections=100,
    conventions="mmdet",
    **backbone,
):
    """Mask R-CNN on a backbone by name, see backbone_of; further arguments go to the backbone.

    anchor_size: side of the anchors on the finest level, pixels; each level doubles it.
    rois: sampled per image to train the heads.
    proposals: kept per image; twice as many enter NMS on each level in training.
    detections: kept per image.
    conventions: "mmdet", with which the published results were made, or "detectron2"; see
        focalnet_det.heads.mmdet.conventions. The parameters are the same.
    """
    if conventions not in ("mmdet", "detectron2"):
        raise ValueError(f"Unknown conventions {conventions!r}. Known: detectron2, mmdet.")
    model = L(GeneralizedRCNN)(
        backbone=L(build_fpn)(
            bottom_up=backbone_of(name, **backbone),
            out_channels=channels,
            norm=norm,
        ),
        proposal_generator=_rpn(channels, anchor_size, proposals),
        roi_heads=_roi_heads(num_classes, channels, fc_dim, mask_convs, norm, rois),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    )
    model.roi_heads.box_predictor.test_topk_per_image = detections
    if conventions == "mmdet":
        _use_mmdet_conventions(model)
    return model


def faster_rcnn(name, **options):
    """Faster R-CNN: Mask R-CNN without masks; arguments as in mask_rcnn."""
    return without_masks(mask_rcnn(name, **options))


def without_masks(model):
    """Takes the mask branch out of a Mask R-CNN."""
    for part in ("mask_in_features", "mask_pooler", "mask_head"):
        del model.roi_heads[part]
    return model


def _use_mmdet_conventions(model):
    model._target_ = MmdetRCNN
    rpn, predictor = model.proposal_generator, model.roi_heads.box_predictor
    rpn._target_ = MmdetRPN
    rpn.anchor_matcher = L(MmdetMatcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1])
    for part in (rpn, predictor):
        part.box2box_transform._target_ = MmdetBox2BoxTransform


def _rpn(channels, anchor_size, proposals):
    return L(RPN)(
        in_features=[*LEVELS, "p6"],
        head=L(StandardRPNHead)(in_channels=channels, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[anchor_size * 2**i] for i in range(5)],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2 * proposals, proposals),
        post_nms_topk=(proposals, proposals),
        nms_thresh=0.7,
    )


def _roi_heads(num_classes, channels, fc_dim, mask_convs, norm, rois):
    return L(EmptyImageROIHeads)(
        num_classes=num_classes,
        batch_size_per_image=rois,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=list(LEVELS),
        box_pooler=roi_pooler(7),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels=channels, height=7, width=7),
            conv_dims=[],
            fc_dims=[fc_dim, fc_dim],
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=fc_dim),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
        ),
        mask_in_features=list(LEVELS),
        mask_pooler=roi_pooler(14),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=L(ShapeSpec)(channels=channels, height=14, width=14),
            num_classes="${..num_classes}",
            conv_dims=[channels] * (mask_convs + 1),
            conv_norm=norm,
        ),
    )


def roi_pooler(size):
    """RoIAlign from all levels to size x size."""
    return L(FastROIPooler)(
        output_size=size,
        scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )


def nano_mask_rcnn(name="focalnet_nano", **changes):
    """A small one for machines without a GPU: narrow heads, GroupNorm, small objects.

    name: of a small backbone.
    changes: other arguments of mask_rcnn, or of the backbone.
    """
    small = {
        "channels": 64,
        "norm": "GN",
        "fc_dim": 256,
        "mask_convs": 1,
        "anchor_size": 16,
        "rois": 64,
        "proposals": 250,
        "conventions": "detectron2",
    }
    model = mask_rcnn(name, **(small | changes))
    heads = model.roi_heads
    # Two normalized convolutions before one linear layer, boxes shared by the classes: these learn
    # from few images. Objects are smaller than COCO's at 800 px, hence the levels by half the size.
    heads.box_head.conv_dims, heads.box_head.conv_norm = [64, 64], "GN"
    heads.box_predictor.cls_agnostic_bbox_reg = True
    heads.box_pooler.canonical_box_size = 112
    return model


def nano_faster_rcnn(**changes):
    """A small one without masks; changes as in nano_mask_rcnn."""
    return without_masks(nano_mask_rcnn(**changes))


def pool_coarsely(model):
    """Masks of 20 x 20 pixels instead of 28 x 28, and a fixed number of samples a cell.

    In training on CPUs, most of the mask branch's time goes where these numbers are squared.
    """
    heads = model.roi_heads
    heads.box_pooler.sampling_ratio = 2
    heads.mask_pooler.update(output_size=10, sampling_ratio=1)
    return model
