"""COCO files with a fault, and what a run does with them."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from focalnet_det.data.augmentation import resize
from focalnet_det.data.instances.mappers import InstanceMapper, SkippedImage
from focalnet_det.data.registry import register_coco_json
from focalnet_det.evaluation import build_evaluator
from tests.helpers import bad_files
from tests.helpers.bad_files import Change

NAME = "test_bad_coco"

OBJECT = ("annotations", 1)

ALL = ("annotations", "*")


def use_all() -> None:
    """What a run does with the registered set: every image in training, and a score."""
    options: dict[str, Any] = {"is_train": True, "augmentations": resize(short_sides=(40,))}
    records = DatasetCatalog.get(NAME)
    for masks in (False, True):
        mapper = InstanceMapper(
            masks=masks, recompute_boxes=masks, image_format="RGB", **options,
            keypoints=not masks, keypoint_hflip_indices=None if masks else [1, 0],
        )  # fmt: skip
        for record in records:
            try:
                found = mapper(record)["instances"]
            except SkippedImage:
                continue
            assert torch.isfinite(found.gt_boxes.tensor).all()


def evaluate() -> Any:
    evaluator = build_evaluator(NAME, tasks=("bbox",))
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = Boxes(torch.zeros(0, 4))
        found.scores, found.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()


def write(folder: Path, change: Change) -> Path:
    content = bad_files.coco()
    change(content)
    return bad_files.write_json(folder / "bad.json", content)


def stopped(path: Path, images: Path, *, evaluation: bool) -> str:
    """The message of the one error; it names the file, and comes at once."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"bad\.json") as raised:
        register_coco_json(NAME, path, images, evaluation=evaluation)
    assert time.monotonic() - start < 20
    # A traceback's text would be no sentence.
    assert str(raised.value).strip().endswith((".", ")"))
    return str(raised.value)
