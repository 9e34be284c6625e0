"""Cascade Mask R-CNN, RetinaNet, ATSS and RepPoints v2 from mmdet's names and back."""

import math

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from torch import Tensor, nn

from focalnet_det.checkpoint import load_initial_weights
from focalnet_det.checkpoint.layouts.detectors import (
    find_detectron2_method,
    to_detectron2,
    to_public,
)
from focalnet_det.experiment import load_config, read_experiment
from tests.helpers.paths import CONFIGS

THIN = ["model.backbone.bottom_up.embed_dim=8", "model.backbone.bottom_up.depths=[1,1,1,1]"]
LEAVES = {
    "cascade_mask_rcnn": (
        "COCO-InstanceSegmentation/cascade_mask_rcnn_focalnet_tiny_lrf_fpn_3x.py",
        [f"model.roi_heads.box_heads.{k}.fc_dims=[8]" for k in range(3)]
        + [f"model.roi_heads.box_predictors.{k}.input_shape.channels=8" for k in range(3)],
    ),
    "retinanet": ("COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.py", []),
    "atss": ("COCO-Detection/atss_focalnet_tiny_lrf_fpn_3x.py", []),
    "reppoints_v2": ("COCO-Detection/reppoints_v2_focalnet_tiny_lrf_bifpn_3x.py", []),
}
# Names of mmdet, by hand, and where each belongs here.
SAMPLES = {
    "cascade_mask_rcnn": {
        "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral2.weight",
        "roi_head.bbox_head.2.shared_convs.3.conv.weight": "roi_heads.box_head.2.conv4.weight",
        "roi_head.bbox_head.1.shared_convs.0.bn.running_var": (
            "roi_heads.box_head.1.conv1.norm.running_var"
        ),
        "roi_head.bbox_head.0.fc_reg.bias": "roi_heads.box_predictor.0.bbox_pred.bias",
        "roi_head.mask_head.2.convs.3.conv.bias": "roi_heads.mask_head.2.mask_fcn4.bias",
        "roi_head.mask_head.1.upsample.weight": "roi_heads.mask_head.1.deconv.weight",
    },
    "retinanet": {
        "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral3.weight",
        "neck.fpn_convs.4.conv.weight": "backbone.top_block.p7.weight",
        "bbox_head.cls_convs.3.conv.weight": "head.cls_subnet.6.weight",
        "bbox_head.reg_convs.1.conv.bias": "head.bbox_subnet.2.bias",
        "backbone.norm0.weight": "backbone.bottom_up.norm0.weight",
    },
    "atss": {
        "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral3.weight",
        "neck.fpn_convs.3.conv.bias": "backbone.top_block.p6.bias",
        "bbox_head.cls_convs.3.conv.weight": "head.cls_subnet.9.weight",
        "bbox_head.reg_convs.1.gn.bias": "head.bbox_subnet.4.bias",
        "bbox_head.atss_centerness.bias": "head.ctrness.bias",
        "bbox_head.scales.4.scale": "head.scales.4.scale",
        "backbone.norm1.weight": "backbone.bottom_up.norm1.weight",
    },
    "reppoints_v2": {
        "neck.bi_fpn.0.lateral_convs.4.gn.bias": "backbone.bi_fpn.0.lateral_convs.4.gn.bias",
        "neck.bi_fpn.1.out_combine.3.weights": "backbone.bi_fpn.1.out_combine.3.weights",
        "neck.bi_fpn.1.lateral_combine_conv.2.gn.bias": (
            "backbone.bi_fpn.1.lateral_combine_conv.2.gn.bias"
        ),
        "bbox_head.shared_convs.0.conv.weight": "head.shared_convs.0.conv.weight",
        "bbox_head.hem_br.p_gn1.weight": "head.hem_br.p_gn1.weight",
        "bbox_head.hem_tl.p2_conv1.conv.weight": "head.hem_tl.p2_conv1.conv.weight",
        "bbox_head.reppoints_hem_tl_score_out.bias": "head.reppoints_hem_tl_score_out.bias",
        "bbox_head.reppoints_cls_conv.weight": "head.reppoints_cls_conv.weight",
        "bbox_head.reppoints_pts_refine_out.bias": "head.reppoints_pts_refine_out.bias",
    },
}


def model_of(method: str) -> nn.Module:
    leaf, options = LEAVES[method]
    return read_experiment(load_config(CONFIGS / leaf, [*THIN, *options])).model()


@pytest.mark.parametrize("method", LEAVES)
def test_there_and_back(method: str) -> None:
    torch.manual_seed(1)
    source, target = model_of(method), model_of(method)
    ours = {n: torch.randn_like(t) if t.is_floating_point() else t
            for n, t in source.state_dict().items()}  # fmt: skip
    assert find_detectron2_method(ours) == method
    theirs = to_public(ours, method)
    for name, own in SAMPLES[method].items():
        assert torch.equal(theirs[name], ours[own]), name
    back, layout = to_detectron2(theirs)
    assert layout == "mmdet"
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    report = load_initial_weights(target, theirs)
    assert not report.missing
    assert not report.dropped
    assert all(torch.equal(t, ours[n]) for n, t in target.state_dict().items())


def mmdet_anchors(base: float) -> list[Tensor]:
    """(width, height) by mmdet's formula: all sizes of a ratio, then the next ratio."""
    return [
        torch.tensor([base * 2 ** (k / 3) / math.sqrt(r), base * 2 ** (k / 3) * math.sqrt(r)])
        for r in (0.5, 1.0, 2.0)
        for k in range(3)
    ]


def test_anchors_keep_their_weights() -> None:
    """Each output channel belongs to the anchor of the same shape before and after."""
    model = model_of("retinanet")
    cells = next(iter(model.anchor_generator.cell_anchors))
    own = cells[:, 2:] - cells[:, :2]
    names = {"bbox_head.retina_cls.bias": 80, "bbox_head.retina_reg.bias": 4}
    theirs = to_public(model.state_dict(), "retinanet")
    for name, values in names.items():
        # The number of its anchor in mmdet's order, and of the value.
        theirs[name] = torch.arange(9.0).repeat_interleave(values)
        theirs[name] += torch.arange(values).repeat(9) / 1000
    converted, _ = to_detectron2(theirs)
    expected = mmdet_anchors(32.0)
    for name, values in (("head.cls_score.bias", 80), ("head.bbox_pred.bias", 4)):
        rows = converted[name].view(9, values)
        for anchor, row in zip(own, rows, strict=True):
            index = int(row[0])
            torch.testing.assert_close(expected[index], anchor, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(row - index, torch.arange(values) / 1000, atol=1e-5, rtol=0)
