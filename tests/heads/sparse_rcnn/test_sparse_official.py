"""Sparse R-CNN equals mmdet's with the official FocalNet, stage by stage."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch

from focalnet_det.checkpoint.layouts.detectors import to_detectron2, to_public
from focalnet_det.compat import make_image_list
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.sparse_rcnn import SparseRCNN, sparse_rcnn
from focalnet_det.necks.fpn import build_fpn
from tests.helpers.official_mmdet import compare, deterministic_weights, image, stored

CASE = "sparse_rcnn"


@pytest.fixture(scope="module")
def model() -> SparseRCNN:
    numbers, _ = stored(CASE)
    backbone = focalnet_backbone("focalnet_tiny_srf", focal_windows=(11, 9, 9, 7))
    built = sparse_rcnn(backbone=build_fpn(backbone), num_classes=80).eval()
    assert sum(p.numel() for p in built.parameters()) == numbers["params"]["total"]
    official = deterministic_weights(CASE)
    weights, layout = to_detectron2(official)
    assert layout == "mmdet"
    built.load_state_dict(weights)
    back = to_public(built.state_dict(), CASE)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official), "bit-exact"
    return built


@torch.no_grad()
def test_every_stage_equals_the_official_one(model: SparseRCNN) -> None:
    pixels = image(CASE)
    height, width = pixels.shape[-2:]
    levels = model.backbone(pixels)
    for i, name in enumerate(model.in_features):
        compare(CASE, f"neck/{i}", levels[name], 2e-3)
    sizes = torch.tensor([[width, height, width, height]], dtype=torch.float32)
    compare(CASE, "init_boxes", model.proposal_boxes(sizes), 1e-3)
    stages = model.predict(make_image_list(list(pixels), 32), sizes)
    assert len(stages) == 6
    for k, stage in enumerate(stages):
        compare(CASE, f"s{k}/cls", stage.logits, 2e-3)
        compare(CASE, f"s{k}/boxes", stage.boxes, 0.05)
        compare(CASE, f"s{k}/obj", stage.features, 2e-3)
    _, arrays = stored(CASE)
    found = model.detections(stages[-1].logits[0], stages[-1].boxes[0], (height, width))
    assert len(found) == 300
    best = found[found.scores.argsort(descending=True)[:50]]
    expected = arrays["det/scores"]
    torch.testing.assert_close(best.scores, expected, atol=1e-3, rtol=0)
    near = (best.pred_boxes.tensor[:, None] - arrays["det/boxes"]).abs().amax(2) < 0.05
    same = near & (best.pred_classes[:, None] == arrays["det/labels"])
    assert same.any(1).sum() >= 48
