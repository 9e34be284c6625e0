"""RepPoints v2."""

from detectron2.config import LazyCall as L

from focalnet_det.heads.atss import ATSSMatcher
from focalnet_det.heads.reppoints_v2 import RepPointsV2, RepPointsV2Head
from focalnet_det.necks.bifpn import BiFPN

from .backbones import backbone_of
from .retinanet import LEVELS


def reppoints_v2(
    name, *, num_classes=80, channels=256, convs=3, corner_channels=64, repeats=2, **backbone
):
    """RepPoints v2 on a backbone by name, see backbone_of; further arguments go to the backbone.

    channels, corner_channels: divisible by 32.
    repeats: passes of the BiFPN.
    """
    return L(RepPointsV2)(
        backbone=L(BiFPN)(
            bottom_up=backbone_of(name, first_stage=2, **backbone),
            out_channels=channels,
            repeats=repeats,
        ),
        head=L(RepPointsV2Head)(
            num_classes="${..num_classes}",
            channels=channels,
            convs=convs,
            shared_convs=1,
            corner_channels=corner_channels,
            prior_prob=0.01,
        ),
        head_in_features=list(LEVELS),
        num_classes=num_classes,
        matcher=L(ATSSMatcher)(topk=9),
        test_score_thresh=0.05,
        test_topk_candidates=1000,
        test_nms_thresh=0.6,
        max_detections_per_image=100,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
        input_format="RGB",
    )
