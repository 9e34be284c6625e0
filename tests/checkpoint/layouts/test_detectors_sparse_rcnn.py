"""Sparse R-CNN from mmdet's names and back, at any number of stages."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch

from focalnet_det.checkpoint import inspect_checkpoint, load_initial_weights
from focalnet_det.checkpoint.layouts.detectors import (
    find_detectron2_method,
    to_detectron2,
    to_public,
)
from focalnet_det.experiment import load_config, read_experiment
from tests.helpers.paths import CONFIGS
from tests.helpers.thin_recipes import FAMILIES, NARROW

LEAF = CONFIGS / "COCO-Detection/sparse_rcnn_focalnet_tiny_lrf_fpn_3x.py"
# Names of mmdet, by hand, and where each belongs here.
STAGE = "roi_head.bbox_head.1"
SAMPLES = {
    "neck.fpn_convs.3.conv.bias": "backbone.fpn_output5.bias",
    "rpn_head.init_proposal_bboxes.weight": "init_proposal_boxes.weight",
    f"{STAGE}.attention.attn.in_proj_bias": "head.head_series.1.self_attn.in_proj_bias",
    f"{STAGE}.instance_interactive_conv.norm_in.weight": (
        "head.head_series.1.inst_interact.norm1.weight"
    ),
    f"{STAGE}.instance_interactive_conv_norm.bias": "head.head_series.1.norm2.bias",
    f"{STAGE}.ffn.layers.0.0.weight": "head.head_series.1.linear1.weight",
    f"{STAGE}.reg_fcs.7.bias": "head.head_series.1.reg_module.7.bias",
    f"{STAGE}.fc_cls.weight": "head.head_series.1.class_logits.weight",
}


def test_there_and_back() -> None:
    torch.manual_seed(1)
    opts = [*NARROW, *FAMILIES["sparse_rcnn"], "model.num_classes=7"]
    experiment = read_experiment(load_config(LEAF, opts))
    source, target = experiment.model(), experiment.model()
    ours = {name: torch.randn_like(t) for name, t in source.state_dict().items()}
    assert find_detectron2_method(ours) == "sparse_rcnn"
    theirs = to_public(ours, "sparse_rcnn")
    for name, own in SAMPLES.items():
        assert torch.equal(theirs[name], ours[own]), name
    back, layout = to_detectron2(theirs)
    assert layout == "mmdet"
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    report = load_initial_weights(target, theirs)
    assert not report.missing
    assert not report.dropped
    assert all(torch.equal(t, ours[n]) for n, t in target.state_dict().items())
    for names in (ours, theirs):
        found = inspect_checkpoint(names)
        assert (found.method, found.classes) == ("sparse_rcnn", 7)
        assert found.architecture.startswith("a Sparse R-CNN (7 classes")
