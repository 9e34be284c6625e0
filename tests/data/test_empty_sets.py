"""Sets without objects: a training says so in one sentence, an evaluation goes on."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances, pairwise_iou

from focalnet_det.data.augmentation import resize
from focalnet_det.data.check_dataset import check_dataset
from focalnet_det.data.instances.mappers import InstanceMapper
from focalnet_det.data.loader import build_test_loader, build_train_loader, check_masks
from focalnet_det.data.registry import register_coco_json
from focalnet_det.data.shapes.generate import make_shapes
from focalnet_det.evaluation import build_evaluator
from tests.helpers import bad_files
from tests.helpers.bad_files import Change, both, drop, put

NAME = "test_empty_sets"

pytestmark = pytest.mark.usefixtures("forget_data_sets")
EMPTY: dict[str, Change] = {
    "no annotations": put("annotations", []),
    "crowds alone": put("annotations", "*", "iscrowd", 1),
}


def registered(folder: Path, change: Change, *, evaluation: bool = False) -> None:
    content = bad_files.coco()
    change(content)
    images = bad_files.write_images(folder / "images")
    register_coco_json(
        NAME, bad_files.write_json(folder / "a.json", content), images, evaluation=evaluation
    )


def train_loader(**options: Any) -> Any:
    common: dict[str, Any] = {"augmentations": resize(short_sides=(32,)), "num_workers": 0}
    return build_train_loader(datasets=NAME, batch_size=2, **common, **options)


@pytest.mark.parametrize("case", sorted(EMPTY))
def test_training_says_it_in_a_sentence(case: str, tmp_path: Path) -> None:
    registered(tmp_path, EMPTY[case])
    assert MetadataCatalog.get(NAME).num_annotated_images == 0
    with pytest.raises(ValueError, match="none of its 3 images has an annotation other than cr"):
        train_loader()


@pytest.mark.parametrize("case", sorted(EMPTY))
def test_evaluation_goes_on(case: str, tmp_path: Path) -> None:
    registered(tmp_path, EMPTY[case], evaluation=True)
    evaluator = build_evaluator(NAME)
    evaluator.reset()
    loader = build_test_loader(dataset=NAME, augmentations=[], num_workers=0)
    for inputs in loader:
        found = Instances((inputs[0]["height"], inputs[0]["width"]))
        found.pred_boxes = Boxes(torch.tensor([[1.0, 1, 9, 9]]))
        found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        evaluator.process(inputs, [{"instances": found}])
    assert math.isnan(evaluator.evaluate()["bbox"]["AP"])


def test_batches_without_objects_have_every_field(tmp_path: Path) -> None:
    registered(tmp_path, both(drop("annotations", 6), put("annotations", "*", "image_id", 10)))
    loader = train_loader(filter_empty=False)
    sizes = []
    for _, batch in zip(range(12), loader, strict=False):
        for example in batch:
            instances = example["instances"]
            sizes.append(len(instances))
            assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", "gt_masks"}
            assert instances.gt_boxes.tensor.shape == (len(instances), 4)
            assert instances.gt_boxes.tensor.dtype == torch.float32
            assert instances.gt_masks.tensor.shape == (len(instances), *example["image"].shape[1:])
    assert set(sizes) == {0, 6}


@pytest.mark.parametrize("keypoints", [False, True])
def test_crops_without_objects_have_every_field(keypoints: bool, tmp_path: Path) -> None:
    registered(tmp_path, lambda _: None)
    mapper = InstanceMapper(
        is_train=True,
        augmentations=[T.CropTransform(30, 20, 16, 12)],
        image_format="RGB",
        masks=not keypoints,
        recompute_boxes=not keypoints,
        keypoints=keypoints,
        keypoint_hflip_indices=[1, 0] if keypoints else None,
    )
    for record in DatasetCatalog.get(NAME):
        found = mapper(record)["instances"]
        assert len(found) == 0
        assert found.gt_boxes.tensor.shape == (0, 4)
        if keypoints:
            assert found.gt_keypoints.tensor.shape == (0, 2, 3)
        else:
            assert found.gt_masks.tensor.shape == (0, 12, 16)


def test_images_without_keypoints_stop_a_training_of_keypoints(tmp_path: Path) -> None:
    registered(tmp_path, without_keypoints)
    with pytest.raises(ValueError, match="no object in its 3 images has a keypoint"):
        train_loader(masks=False, keypoints=True)


@pytest.mark.parametrize("number", [0, 2, 4, 6])
def test_objects_without_masks(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of six objects: a few are left out and said, most or all stop; an evaluation needs all."""

    def change(content: dict[str, Any]) -> None:
        for row in content["annotations"][:number]:
            row["segmentation"] = []

    registered(tmp_path, change)
    records = DatasetCatalog.get(NAME)
    message = {4: "4 of 6 annotations", 6: "No annotation of"}.get(number)
    if message is None:
        train_loader()
        assert ("2 of 6 annotations have no mask" in caplog.text) == (number == 2)
    else:
        with pytest.raises(ValueError, match=message):
            train_loader()
    assert train_loader(masks=False).num_images == 3
    if number:
        with pytest.raises(ValueError, match=rf"{number} of 7 annotations of {NAME} have no mask"):
            check_dataset(NAME, evaluation=True, masks=True)
    else:
        check_masks(NAME, records, evaluation=True)
    assert check_dataset(NAME, evaluation=True) == 3


def without_keypoints(content: dict[str, Any]) -> None:
    for row in content["annotations"]:
        row.pop("keypoints", None)


def test_small_boxes_keep_their_place(tmp_path: Path) -> None:
    """Of boxes under 32 px, IoU with the exact box after a resize; whole pixels spoil half."""
    root = make_shapes(tmp_path / "shapes", train=20, val=1, size=(96, 96), seed=0, workers=1)
    register_coco_json(NAME, root / "annotations/instances_train.json", root / "images/train")
    height = 61  # of 96: sides of 30 become 19.06
    options: dict[str, Any] = {
        "is_train": True,
        "augmentations": [T.Resize((height, height))],
        "image_format": "RGB",
        "masks": True,
    }
    counts = {True: 0, False: 0}
    total = 0
    for record in DatasetCatalog.get(NAME):
        rows = [row for row in record["annotations"] if not row["iscrowd"]]
        exact = np.array([row["bbox"] for row in rows]) * (height / 96)
        exact[:, 2:] += exact[:, :2]
        instances = InstanceMapper(recompute_boxes=True, **options)(record)["instances"]
        small = torch.tensor((exact[:, 2:] - exact[:, :2]).max(axis=1) < 32)
        total += int(small.sum())
        pixels = instances.gt_masks.get_bounding_boxes()
        for ours, boxes in ((True, instances.gt_boxes), (False, pixels)):
            iou = pairwise_iou(boxes, Boxes(torch.tensor(exact, dtype=torch.float32))).diag()
            counts[ours] += int((iou[small] < 0.95).sum())
    assert total > 30
    assert counts[True] == 0
    assert counts[False] > total / 4
