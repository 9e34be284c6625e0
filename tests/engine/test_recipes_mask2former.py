"""Mask2Former's recipes train a step and evaluate, on data of one's own."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch

from focalnet_det.engine.main import RunArguments, run
from tests.engine.test_recipes import data, semantic_data
from tests.helpers.paths import CONFIGS

LEAVES = sorted(CONFIGS.glob("*/mask2former_*.*"))
THIN = {
    ".py": [
        *("model.backbone.embed_dim=8", "model.backbone.depths=[1,1,1,1]", "model.queries=5"),
        *("model.channels=32", "model.encoder_layers=1", "model.decoder_layers=2"),
        *("model.points=40", "model.train_size=[64,64]", "model.object_threshold=0.05"),
        *("dataloader.train.batch_size=2", "dataloader.train.num_workers=0", "train.pictures=0"),
        *("dataloader.test.0.num_workers=0", "dataloader.test.0.augmentations.short_side=64"),
        *("schedule.iterations=1", "train.device=cpu"),
    ],
    ".yaml": [
        *("MODEL.FOCALNET.EMBED_DIM=8", "MODEL.FOCALNET.DEPTHS=(1,1,1,1)", "MODEL.DEVICE=cpu"),
        *("MODEL.MASK2FORMER.QUERIES=5", "MODEL.MASK2FORMER.CHANNELS=32", "TEST.PICTURES=0"),
        *("MODEL.MASK2FORMER.ENCODER_LAYERS=1", "MODEL.MASK2FORMER.DECODER_LAYERS=2"),
        *("MODEL.MASK2FORMER.POINTS=40", "MODEL.MASK2FORMER.TRAIN_SIZE=(64,64)"),
        *("SOLVER.IMS_PER_BATCH=2", "SOLVER.MAX_ITER=1", "INPUT.SEMANTIC_CROPS.CROP=64"),
        *("INPUT.MIN_SIZE_TEST=64", "DATALOADER.NUM_WORKERS=0"),
    ],
}
SCORES = {
    "Semantic": {"sem_seg"},
    "Instance": {"bbox", "segm"},
    # Own panoptic data have no file of instances.
    "Panoptic": {"sem_seg", "panoptic_seg"},
}


def arguments(path: Path, shapes: Path, output: Path, precision: str) -> RunArguments:
    key = "train.precision" if path.suffix == ".py" else "SOLVER.PRECISION"
    opts = [*THIN[path.suffix], f"{key}={precision}"]
    if path.suffix == ".py":
        jitter = "COCO" in path.parent.name
        opts.append(f"dataloader.train.augmentations.{'size' if jitter else 'crop'}=64")
    args = RunArguments(config_file=str(path), opts=opts, output=str(output))
    if "Semantic" in path.parent.name:
        return dataclasses.replace(args, **semantic_data(shapes))
    if "Instance" in path.parent.name:
        return dataclasses.replace(args, **data(shapes))
    return dataclasses.replace(
        args,
        panoptic_json=[str(shapes / "annotations/panoptic_train.json")],
        panoptic_root=[str(shapes / "panoptic_train")],
        images=[str(shapes / "images/train")],
        val_panoptic_json=[str(shapes / "annotations/panoptic_val.json")],
        val_panoptic_root=[str(shapes / "panoptic_val")],
        val_images=[str(shapes / "images/val")],
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", LEAVES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_recipe_trains_a_step_and_evaluates(path: Path, shapes: Path, tmp_path: Path) -> None:
    # Every other recipe in half precision, so that each task is trained in both.
    precision = ("fp32", "bf16")[LEAVES.index(path) % 2]
    (results,) = run(arguments(path, shapes, tmp_path, precision)).values()
    kind = path.parent.name.split("-")[1].removesuffix("Segmentation")
    assert set(results) == SCORES[kind]
    if kind == "Panoptic":
        # The names of things and of stuff, in one numbering.
        assert {"PQ-circle", "PQ-water"} <= set(results["panoptic_seg"])
        assert {"IoU-circle", "IoU-water"} <= set(results["sem_seg"])
    for metrics in results.values():
        assert all(0 <= value <= 100 or math.isnan(value) for value in metrics.values())
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.json").open())
    # Three predictions, of cross-entropies, of binary ones and of dice.
    assert sum("loss_" in key and key != "total_loss" for key in line) == 9
    assert 0 < line["total_loss"] < 200
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    classes = {"Semantic": 10, "Instance": 6, "Panoptic": 10}[kind]
    assert len(weights["sem_seg_head.predictor.class_embed.bias"]) == classes + 1
    shutil.rmtree(tmp_path)
