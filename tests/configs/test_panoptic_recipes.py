"""The panoptic recipes: what they add to Mask R-CNN, and what they leave as it is."""

from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.modeling import PanopticFPN
from torch import nn

from focalnet_det.experiment import load_config, read_experiment
from focalnet_det.heads.mmdet.conventions import MmdetRPN
from tests.helpers.paths import CONFIGS

FOLDER = CONFIGS / "COCO-PanopticSegmentation"
VARIANTS = ("tiny_srf", "tiny_lrf")


def build_without_memory(path: Path, *overrides: str) -> nn.Module:
    with torch.device("meta"), mock.patch.object(nn.Module, "to", lambda self, *_, **__: self):
        return read_experiment(load_config(path, list(overrides))).model()


def test_recipes_are_complete() -> None:
    names = {f"panoptic_fpn_focalnet_{v}_{s}" for v in VARIANTS for s in ("1x", "3x")}
    assert {path.stem for path in FOLDER.glob("panoptic_fpn_*.py")} == names


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_size_is_that_of_mask_rcnn_and_the_semantic_head(variant: str, suffix: str) -> None:
    if suffix == ".yaml":
        path = FOLDER / "panoptic_fpn_focalnet_tiny_srf_1x.yaml"
        model = build_without_memory(path, f"MODEL.FOCALNET.VARIANT=focalnet_{variant}")
    else:
        model = build_without_memory(FOLDER / f"panoptic_fpn_focalnet_{variant}_1x.py")
    assert type(model) is PanopticFPN
    assert type(model.proposal_generator) is MmdetRPN
    # 1, 1, 2 and 3 convolutions of 3 x 3 with group norm on the four levels; 54 classes.
    convolutions = 4 * 256 * 128 * 9 + 3 * 128 * 128 * 9
    head = convolutions + 7 * 2 * 128 + 128 * 54 + 54
    assert sum(p.numel() for p in model.sem_seg_head.parameters()) == head
    detector = CONFIGS / f"COCO-InstanceSegmentation/mask_rcnn_focalnet_{variant}_fpn_1x.py"
    rest = sum(p.numel() for p in build_without_memory(detector).parameters())
    assert sum(p.numel() for p in model.parameters()) == rest + head
    assert model.sem_seg_head.loss_weight == 0.5
    assert model.sem_seg_head.ignore_value == 255
    thresholds = (
        model.combine_overlap_thresh,
        model.combine_stuff_area_thresh,
        model.combine_instances_score_thresh,
    )
    assert thresholds == (0.5, 4096, 0.5)
