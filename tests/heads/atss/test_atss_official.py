"""Every intermediate result of ATSS against stored outputs of mmdet."""

from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor

from focalnet_det.checkpoint import load_initial_weights
from focalnet_det.experiment import load_config, read_experiment
from tests.helpers import official_atss as case
from tests.helpers.paths import CONFIGS

LEAF = CONFIGS / "COCO-Detection/atss_focalnet_tiny_lrf_fpn_3x.py"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Features, predictions, anchors and detections of the stored weights and image."""
    weights = case.weights()
    srf = ["model.backbone.bottom_up.variant=focalnet_tiny_srf"]
    model = read_experiment(load_config(LEAF, srf)).model().eval()
    report = load_initial_weights(model, weights)
    assert not report.missing
    assert not report.dropped
    # The stored image is normalized already.
    model.pixel_mean.zero_()
    model.pixel_std.fill_(1.0)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    hooks = [(model.backbone.bottom_up, "backbone"), (model.backbone, "neck"), (model.head, "head"),
             (model.anchor_generator, "anchors")]  # fmt: skip
    for module, name in hooks:
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
    with torch.no_grad():
        found["det"] = model([{"image": case.image()[0]}])[0]["instances"]
    return found


def test_sizes(results: dict[str, Any]) -> None:
    numbers, _ = case.stored()
    assert results["parameters"] == numbers["params"]["total"]


def test_features(results: dict[str, Any]) -> None:
    for part, names in (("backbone", ("stage2", "stage3", "stage4")),
                        ("neck", ("p3", "p4", "p5", "p6", "p7"))):  # fmt: skip
        for i, name in enumerate(names):
            assert case.difference(f"{part}/{i}", results[part][name]) < 2e-3


@pytest.mark.parametrize(("kind", "index"), [("cls", 0), ("reg", 1), ("ctr", 2)])
def test_predictions(results: dict[str, Any], kind: str, index: int) -> None:
    for i, value in enumerate(results["head"][index]):
        assert case.difference(f"{kind}/{i}", value) < 2e-3


def test_anchors(results: dict[str, Any]) -> None:
    for i, anchors in enumerate(results["anchors"]):
        assert case.difference(f"anchors/{i}", anchors.tensor) == 0


def test_detections(results: dict[str, Any]) -> None:
    """At least 48 of the 50 detections of highest score are those that are stored."""
    _, arrays = case.stored()
    found: Instances = results["det"]
    boxes, scores, labels = (arrays[f"atss/det/{n}"] for n in ("boxes", "scores", "labels"))
    assert len(found) == 100
    matched = 0
    for box, score, label in zip(boxes, scores, labels, strict=True):
        same: Tensor = (found.pred_boxes.tensor - box).abs().amax(dim=1) < 0.05
        same &= (found.scores - score).abs() < 1e-3
        matched += int((same & (found.pred_classes == label)).any())
    assert matched >= 48
    overlaps = pairwise_iou(found.pred_boxes, found.pred_boxes).fill_diagonal_(0)
    overlaps[found.pred_classes[:, None] != found.pred_classes] = 0
    assert overlaps.max() <= 0.6
