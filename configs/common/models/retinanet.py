"""RetinaNet and FCOS."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet

from focalnet_det.heads.dense import fcos_head, retinanet_head
from focalnet_det.heads.empty import EmptyImageFCOS
from focalnet_det.heads.mmdet.conventions import (
    MmdetBox2BoxTransform,
    MmdetMatcher,
    MmdetRetinaNet,
)
from focalnet_det.necks.fpn import build_retinanet_fpn

from .backbones import backbone_of

LEVELS = ("p3", "p4", "p5", "p6", "p7")


def retinanet(
    name,
    *,
    num_classes=80,
    channels=256,
    norm="",
    convs=4,
    anchor_size=32,
    conventions="mmdet",
    **backbone,
):
    """RetinaNet on a backbone by name, see backbone_of; further arguments go to the backbone.

    anchor_size: side of the smallest anchors on the finest level, of stride 8, pixels.
    conventions: "mmdet" or "detectron2"; see focalnet_det.heads.mmdet.conventions. The parameters
        are the same.
    """
    if conventions not in ("mmdet", "detectron2"):
        raise ValueError(f"Unknown conventions {conventions!r}. Known: detectron2, mmdet.")
    model = L(RetinaNet)(
        # mmdet's backbone has the norm of stage 1 too, which nothing reads: it is frozen.
        backbone=_backbone(backbone_of(name, **backbone), channels, norm),
        head=L(retinanet_head)(
            input_shape=[L(ShapeSpec)(channels=channels)] * len(LEVELS),
            num_classes="${..num_classes}",
            num_anchors=9,
            conv_dims=[channels] * convs,
            norm=norm,
            prior_prob=0.01,
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[anchor_size * 2 ** (i + k / 3) for k in range(3)] for i in range(5)],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
            offset=0.0,
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        num_classes=num_classes,
        head_in_features=list(LEVELS),
        max_detections_per_image=100,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    )
    if conventions == "mmdet":
        model._target_ = MmdetRetinaNet
        model.backbone.p7_relu = False
        model.box2box_transform._target_ = MmdetBox2BoxTransform
        model.anchor_matcher = L(MmdetMatcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], min_low_quality_iou=0.0
        )
    return model


def fcos(name, *, num_classes=80, channels=256, norm="", convs=4, **backbone):
    """FCOS as Detectron2 has it: P6 from P5, GroupNorm in the head; arguments as in retinanet."""
    model = L(EmptyImageFCOS)(
        backbone=_backbone(backbone_of(name, first_stage=2, **backbone), channels, norm),
        head=L(fcos_head)(
            input_shape=[L(ShapeSpec)(channels=channels)] * len(LEVELS),
            num_classes="${..num_classes}",
            conv_dims=[channels] * convs,
            norm="GN",
            prior_prob=0.01,
        ),
        num_classes=num_classes,
        head_in_features=list(LEVELS),
        max_detections_per_image=100,
        test_score_thresh=0.2,
        test_nms_thresh=0.6,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    model.backbone.p6_from = "p5"
    return model


def _backbone(bottom_up, channels, norm):
    return L(build_retinanet_fpn)(bottom_up=bottom_up, out_channels=channels, norm=norm)


def nano_retinanet(**changes):
    """A small one for machines without a GPU: narrow, GroupNorm, small objects.

    changes: other arguments of retinanet, or of the backbone.
    """
    small = {"channels": 64, "norm": "GN", "convs": 2, "anchor_size": 16}
    return retinanet("focalnet_nano", **({**small, "conventions": "detectron2"} | changes))
