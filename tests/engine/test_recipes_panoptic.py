"""Every recipe on panoptic data trains and evaluates."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.main import RunArguments, run
from tests.helpers.paths import CONFIGS
from tests.helpers.thin_recipes import (
    FAMILIES_YAML,
    NARROW,
    PREDICTOR,
    RUN,
    SIZES,
    THIN_YAML,
    semantic_data,
    under,
)

# A .yaml trains what its .py does, as tests of the configs say: one of each kind runs here.
PANOPTIC = sorted(CONFIGS.glob("*-PanopticSegmentation/panoptic_fpn_*.py"))
PANOPTIC += CONFIGS.glob("*-PanopticSegmentation/*tiny_srf_1x.yaml")
SEMANTIC = sorted(CONFIGS.glob("COCO-SemanticSegmentation/*.py"))
THIN_HEAD = "MODEL.SEM_SEG_HEAD.CONVS_DIM=32"
THIN = {
    ".py": [
        *(*RUN, *SIZES, *NARROW, "model.roi_heads.box_head.fc_dims=[16,16]"),
        *under("roi_heads.box_predictor", PREDICTOR),
        *("model.roi_heads.batch_size_per_image=16", "model.sem_seg_head.conv_dims=32"),
        "model.proposal_generator.post_nms_topk=[50,50]",
    ],
    ".yaml": [*THIN_YAML, *FAMILIES_YAML["panoptic_fpn"], THIN_HEAD],
}
THIN_SEGMENTOR = {
    ".py": [*RUN, *SIZES, *NARROW, "model.channels=32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PANOPTIC, ids=[path.name for path in PANOPTIC])
def test_panoptic_recipe_trains_a_step_and_evaluates(
    path: Path, shapes: Path, tmp_path: Path
) -> None:
    args = RunArguments(
        config_file=str(path),
        opts=THIN[path.suffix],
        output=str(tmp_path),
        panoptic_json=[str(shapes / "annotations/panoptic_train.json")],
        panoptic_root=[str(shapes / "panoptic_train")],
        images=[str(shapes / "images/train")],
        val_panoptic_json=[str(shapes / "annotations/panoptic_val.json")],
        val_panoptic_root=[str(shapes / "panoptic_val")],
        val_images=[str(shapes / "images/val")],
    )
    results = run(args)["panoptic_val"]
    assert set(results) == {"sem_seg", "panoptic_seg"}
    for name in ("PQ", "PQ_th", "PQ_st", "PQ-circle", "PQ-water"):
        value = results["panoptic_seg"][name]
        assert 0 <= value <= 100 or math.isnan(value)
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.json").open())
    assert 0 < line["loss_sem_seg"] < line["total_loss"] < 100
    assert line["panoptic_val/panoptic_seg/PQ"] == results["panoptic_seg"]["PQ"]
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", SEMANTIC, ids=[path.name for path in SEMANTIC])
def test_semantic_recipe_trains_a_step_and_evaluates(
    path: Path, shapes: Path, tmp_path: Path
) -> None:
    opts = THIN_SEGMENTOR[path.suffix]
    args = RunArguments(config_file=str(path), opts=opts, output=str(tmp_path))
    results = run(dataclasses.replace(args, **semantic_data(shapes)))
    assert 0 <= results["validation"]["sem_seg"]["mIoU"] <= 100
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.json").open())
    assert 0 < line["total_loss"] < 100
    shutil.rmtree(tmp_path)
