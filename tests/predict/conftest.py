"""Runs of each kind of model, trained for one iteration on generated images."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.data.shapes.generate import make_shapes
from focalnet_det.engine.main import RunArguments, run
from tests.helpers.paths import CONFIGS

COMMON = [
    *("schedule.iterations=1", "train.device=cpu", "train.save_predictions=True"),
    *("dataloader.train.batch_size=2", "dataloader.train.num_workers=0", "train.pictures=0"),
    *("dataloader.test.0.num_workers=0", "dataloader.test.0.augmentations.short_side=96"),
]
CROP = ["dataloader.train.augmentations.crop=64"]
INSTANCES = [*CROP, "dataloader.train.augmentations.short_sides=[96]"]
# Config, overrides, kind of data.
KINDS: dict[str, tuple[str, list[str], str]] = {
    "mask_rcnn": (
        "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py",
        [*INSTANCES, "train.ema_decay=0.5"],
        "coco",
    ),
    "retinanet_with_views": (
        "COCO-Detection/retinanet_focalnet_nano_fpn_small.py",
        [*INSTANCES, "dataloader.test.0.flip=True", "model.test_score_thresh=0.0"],
        "coco",
    ),
    "atss": (
        "Shapes-Detection/atss_focalnet_nano_fpn_small.py",
        [*INSTANCES, "model.test_score_thresh=0.0"],
        "coco",
    ),
    "reppoints_v2": (
        "Shapes-Detection/reppoints_v2_focalnet_nano_bifpn_small.py",
        [*INSTANCES, "model.test_score_thresh=0.0"],
        "coco",
    ),
    "upernet": (
        "ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py",
        [*CROP, "dataloader.train.augmentations.short_side=96", "model.train_size=[64,64]"],
        "semantic",
    ),
    "panoptic_fpn": (
        "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py",
        INSTANCES,
        "panoptic",
    ),
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data set of 4 training and 2 validation images of 96x80 px."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes(root, train=4, val=2, size=(96, 80), seed=3, workers=1)


def data(shapes: Path, kind: str) -> dict[str, Any]:
    images = {"images": [str(shapes / "images/train")], "val_images": [str(shapes / "images/val")]}
    if kind == "semantic":
        names = [c["name"] for c in json.loads((shapes / "categories.json").read_text())]
        (shapes / "classes.txt").write_text("\n".join(names))
        return {
            "sem_images": [str(shapes / "ade/images/training")],
            "sem_labels": [str(shapes / "ade/annotations/training")],
            "val_sem_images": [str(shapes / "ade/images/validation")],
            "val_sem_labels": [str(shapes / "ade/annotations/validation")],
            "classes": str(shapes / "classes.txt"),
            "first_label": 1,
        }
    annotations = shapes / "annotations"
    if kind == "panoptic":
        return images | {
            "panoptic_json": [str(annotations / "panoptic_train.json")],
            "panoptic_root": [str(shapes / "panoptic_train")],
            "val_panoptic_json": [str(annotations / "panoptic_val.json")],
            "val_panoptic_root": [str(shapes / "panoptic_val")],
        }
    return images | {
        "coco_json": [str(annotations / "instances_train.json")],
        "val_json": [str(annotations / "instances_val.json")],
    }


@pytest.fixture(scope="session")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a run by its kind."""

    @cache
    def train(kind: str) -> Path:
        config, overrides, files = KINDS[kind]
        output = tmp_path_factory.mktemp(kind)
        run(
            RunArguments(
                config_file=str(CONFIGS / config),
                opts=[*COMMON, *overrides],
                output=str(output),
                **data(shapes, files),
            )
        )
        return output

    return train
