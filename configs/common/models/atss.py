"""ATSS."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from focalnet_det.heads.atss import ATSS, ATSSHead, ATSSMatcher
from focalnet_det.heads.mmdet.conventions import MmdetBox2BoxTransform
from focalnet_det.necks.fpn import build_retinanet_fpn

from .backbones import backbone_of
from .retinanet import LEVELS


def atss(name, *, num_classes=80, channels=256, norm="", convs=4, anchor_size=64, **backbone):
    """ATSS on a backbone by name, see backbone_of; further arguments go to the backbone.

    norm: of the FPN; the head has GroupNorm.
    anchor_size: side of the anchors on the finest level, of stride 8, pixels.
    """
    return L(ATSS)(
        backbone=L(build_retinanet_fpn)(
            bottom_up=backbone_of(name, first_stage=2, **backbone),
            out_channels=channels,
            norm=norm,
            p6_from="p5",
            p7_relu=False,
        ),
        head=L(ATSSHead)(
            input_shape=[L(ShapeSpec)(channels=channels)] * len(LEVELS),
            num_classes="${..num_classes}",
            conv_dims=[channels] * convs,
            norm="GN",
            prior_prob=0.01,
        ),
        head_in_features=list(LEVELS),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[anchor_size * 2**k] for k in range(5)],
            aspect_ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
            offset=0.0,
        ),
        box2box_transform=L(MmdetBox2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
        anchor_matcher=L(ATSSMatcher)(topk=9),
        num_classes=num_classes,
        box_loss_weight=2.0,
        test_score_thresh=0.05,
        test_topk_candidates=1000,
        test_nms_thresh=0.6,
        max_detections_per_image=100,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    )
