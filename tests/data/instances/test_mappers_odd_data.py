"""Odd objects and images: repaired, dropped, skipped or refused, and counted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError

from focalnet_det.data import issue_policies
from focalnet_det.data.instances.mappers import SkippedImage
from focalnet_det.data.io.coco_files import read_coco
from focalnet_det.data.io.read_image import UnreadableImageError
from focalnet_det.data.issue_policies import ISSUE_POLICIES, IssueCounter
from focalnet_det.data.registry import register_coco_json
from tests.helpers.records import (
    HEIGHT,
    MASK,
    PIXELS,
    TRIANGLE,
    WIDTH,
    annotation,
    compressed,
    encoded,
    make_record,
    map_one,
    mapper,
    rle,
    rotated,
    uncompressed,
)

DROPPED_MASKS = {
    "odd number of coordinates": ([[*TRIANGLE, 3.0]], issue_policies.MALFORMED_MASK),
    "two points": ([[1.0, 1.0, 5.0, 5.0]], issue_policies.MALFORMED_MASK),
    "no coordinate": ([[]], issue_policies.MALFORMED_MASK),
    "not nested": ([1.0, 1.0, 5.0, 1.0, 5.0, 5.0], issue_policies.MALFORMED_MASK),
    "no number": ([["a", 1, 2, 3, 4, 5]], issue_policies.MALFORMED_MASK),
    "NaN": ([[*TRIANGLE[:5], float("nan")]], issue_policies.MALFORMED_MASK),
    "far away": ([[*TRIANGLE[:4], 1e9, 1e9]], issue_policies.MALFORMED_MASK),
    "text": ("polygon", issue_policies.MALFORMED_MASK),
    "size of the RLE": (compressed(MASK[:, :-1]), issue_policies.MALFORMED_MASK),
    "RLE turned": (compressed(np.ascontiguousarray(MASK.T)), issue_policies.MALFORMED_MASK),
    "RLE without counts": ({"size": [HEIGHT, WIDTH]}, issue_policies.MALFORMED_MASK),
    "RLE without size": ({"counts": [PIXELS]}, issue_policies.MALFORMED_MASK),
    "runs too short": (rle([3, 4]), issue_policies.MALFORMED_MASK),
    "runs too long": (rle([3, PIXELS]), issue_policies.MALFORMED_MASK),
    "negative run": (rle([-1, PIXELS + 1]), issue_policies.MALFORMED_MASK),
    "half a pixel": (rle([0.5, PIXELS - 0.5]), issue_policies.MALFORMED_MASK),
    "no runs": (rle([]), issue_policies.MALFORMED_MASK),
    "text too short": (rle(encoded([3, 4])), issue_policies.MALFORMED_MASK),
    "text too long": (rle(encoded([3, PIXELS])), issue_policies.MALFORMED_MASK),
    "text broken off": (rle(encoded([3, 4, PIXELS - 7])[:-1]), issue_policies.MALFORMED_MASK),
    "other characters": (rle("\x01é~~"), issue_policies.MALFORMED_MASK),
    "size of the array": (MASK[:-1], issue_policies.MALFORMED_MASK),
    "array of three dimensions": (MASK[None], issue_policies.MALFORMED_MASK),
    "none": (None, issue_policies.NO_MASK),
    "empty list": ([], issue_policies.NO_MASK),
    "polygon without area": ([[5.0, 5.0, 5.0, 5.0, 5.0, 5.0]], issue_policies.EMPTY_MASK),
    "polygon outside": ([[61.0, 1.0, 70.0, 1.0, 70.0, 9.0]], issue_policies.EMPTY_MASK),
    "empty RLE": (compressed(MASK * 0), issue_policies.EMPTY_MASK),
    "empty runs": (rle([PIXELS]), issue_policies.EMPTY_MASK),
    "empty array": (MASK * 0, issue_policies.EMPTY_MASK),
}


@pytest.mark.parametrize("name", DROPPED_MASKS)
def test_unusable_masks_are_dropped_and_counted(picture: Path, name: str) -> None:
    segmentation, problem = DROPPED_MASKS[name]
    rows = [annotation(segmentation=segmentation), annotation(category_id=5)]
    for recompute_boxes in (False, True):
        found = mapper(recompute_boxes=recompute_boxes)(make_record(picture, rows))
        assert found["data_issues"] == {problem: 1}
        assert found["instances"].gt_classes.tolist() == [5]
    assert ISSUE_POLICIES[problem].training == "dropped"
    # Where no masks are trained, masks do not matter.
    found = mapper(masks=False)(make_record(picture, rows))
    assert "data_issues" not in found
    assert len(found["instances"]) == 2


def test_bad_parts_of_a_mask_are_left_out(picture: Path) -> None:
    rows = [annotation(segmentation=[TRIANGLE, [1.0, 1.0, 5.0]]), annotation()]
    found = mapper()(make_record(picture, rows))
    assert found["data_issues"] == {issue_policies.MALFORMED_PART: 1}
    masks = found["instances"].gt_masks.tensor
    assert masks.any()
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([-5.0, -6.0, 20.0, 20.0], [0, 0, 15, 14]),
        ([50.0, 30.0, 100.0, 100.0], [50, 30, WIDTH, HEIGHT]),
        ([-1e6, -1e6, 3e6, 3e6], [0, 0, WIDTH, HEIGHT]),
    ],
)
def test_boxes_are_clipped_to_the_image(
    picture: Path, bbox: list[float], expected: list[int]
) -> None:
    found = map_one(picture, annotation(bbox=bbox))
    assert found["data_issues"] == {issue_policies.BOX_OUTSIDE: 1}
    assert found["instances"].gt_boxes.tensor.tolist() == [expected]


def test_rounding_is_no_box_outside(picture: Path) -> None:
    found = map_one(picture, annotation(bbox=[50.0, 30.0, 10.005, 10.005]))
    assert "data_issues" not in found
    assert found["instances"].gt_boxes.tensor.tolist() == [[50, 30, WIDTH, HEIGHT]]


@pytest.mark.parametrize(
    ("bbox", "problem"),
    [
        ([10.0, 10.0, 0.0, 5.0], issue_policies.EMPTY_BOX),
        ([10.0, 10.0, 5.0, -2.0], issue_policies.MALFORMED_BOX),
        (["1", "2", "3", "4"], issue_policies.MALFORMED_BOX),
        ([70.0, 10.0, 5.0, 5.0], issue_policies.EMPTY_BOX),
        ([-8.0, 10.0, 8.0, 5.0], issue_policies.EMPTY_BOX),
        ([1.0, 2.0, 3.0], issue_policies.MALFORMED_BOX),
        ([1.0, 2.0, 3.0, 4.0, 5.0], issue_policies.MALFORMED_BOX),
        ([], issue_policies.MALFORMED_BOX),
        (None, issue_policies.MALFORMED_BOX),
        (3.0, issue_policies.MALFORMED_BOX),
        (["a", "b", "c", "d"], issue_policies.MALFORMED_BOX),
        ([1.0, 2.0, float("nan"), 4.0], issue_policies.MALFORMED_BOX),
        ([1.0, 2.0, float("inf"), 4.0], issue_policies.MALFORMED_BOX),
    ],
)
@pytest.mark.parametrize("masks", [False, True])
def test_unusable_boxes_are_dropped_and_counted(
    picture: Path, bbox: Any, problem: str, masks: bool
) -> None:
    rows = [annotation(bbox=bbox), annotation(category_id=5)]
    found = mapper(masks=masks, recompute_boxes=masks)(make_record(picture, rows))
    assert found["data_issues"] == {problem: 1}
    assert found["instances"].gt_classes.tolist() == [5]
    assert ISSUE_POLICIES[problem].training == "dropped"


def test_crowds_are_counted_and_not_trained_on(picture: Path) -> None:
    crowd = annotation(iscrowd=1, segmentation=uncompressed(MASK))
    found = mapper()(make_record(picture, [crowd, annotation(), crowd]))
    assert found["data_issues"] == {issue_policies.CROWD: 2}
    assert len(found["instances"]) == 1


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("rows", "issues"),
    [
        ([], {issue_policies.NO_ANNOTATION: 1}),
        ([annotation(iscrowd=1)], {issue_policies.CROWD: 1, issue_policies.NO_ANNOTATION: 1}),
        (
            [annotation(bbox=[1.0])],
            {issue_policies.MALFORMED_BOX: 1, issue_policies.NO_ANNOTATION: 1},
        ),
    ],
)
def test_images_without_annotation(
    picture: Path, masks: bool, rows: list[dict[str, Any]], issues: dict[str, int]
) -> None:
    found = mapper(masks=masks, recompute_boxes=masks)(make_record(picture, rows))
    assert found["data_issues"] == issues
    assert set(found) == {
        *("file_name", "image_id", "height", "width", "image", "instances", "data_issues")
    }
    instances = found["instances"]
    assert instances.image_size == (HEIGHT, WIDTH)
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64
    assert instances.has("gt_masks") == masks
    if masks:
        assert instances.gt_masks.tensor.shape == (0, HEIGHT, WIDTH)


def test_a_crop_without_objects_is_no_problem_of_the_data(picture: Path) -> None:
    row = annotation(bbox=[0.0, 0.0, 2.0, 2.0], segmentation=[[0.0, 0.0, 2.0, 0.0, 2.0, 2.0]])
    crop = T.CropTransform(30, 20, 20, 15)
    found = map_one(picture, row, augmentations=[crop], recompute_boxes=True)
    assert "data_issues" not in found
    assert found["instances"].gt_masks.tensor.shape == (0, 15, 20)


def unreadable(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    cut = {"truncated": len(content) // 2, "empty": 0}
    path.write_bytes(content[: cut[kind]] if kind in cut else b"no picture")
    return path


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_unreadable_images_are_skipped_in_training_and_stop_evaluation(
    tmp_path: Path, kind: str
) -> None:
    record = make_record(unreadable(tmp_path, kind), [annotation()])
    with pytest.raises(SkippedImage, match=rf"unreadable image: .*{kind}\.jpg") as skipped:
        mapper()(record)
    assert skipped.value.issues == {issue_policies.UNREADABLE_IMAGE: 1}
    with pytest.raises(UnreadableImageError, match=rf"{kind}\.jpg"):
        mapper(is_train=False)(record)
    again = pickle.loads(pickle.dumps(skipped.value))
    assert (again.problem, again.issues, str(again)) == (
        skipped.value.problem,
        skipped.value.issues,
        str(skipped.value),
    )


def test_missing_images_stop_training(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mapper()(make_record(tmp_path / "none.jpg", [annotation()]))


def test_other_sizes_are_skipped_in_training_and_stop_evaluation(
    picture: Path, tmp_path: Path
) -> None:
    stored = {"height": WIDTH, "width": HEIGHT}  # of the file, before EXIF turns it
    rows = [annotation()]
    for record in (
        make_record(rotated(picture, tmp_path), rows, **stored),
        make_record(picture, rows, height=HEIGHT + 1),
    ):
        with pytest.raises(SkippedImage, match="size differs") as skipped:
            mapper()(record)
        assert skipped.value.issues == {issue_policies.SIZE_DIFFERS: 1}
        with pytest.raises(SizeMismatchError, match=r"\.png"):
            mapper(is_train=False)(record)


def test_repairs_of_images_are_counted_in_evaluation_too(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 3, dtype=np.uint8)).save(path)
    for is_train in (False, True):
        found = mapper(is_train=is_train)(make_record(path, [annotation()]))
        assert found["data_issues"] == {issue_policies.NOT_RGB: 1}
        assert (found["image"] == 3).all()


def coco_file(folder: Path, picture: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "instances.json"
    image = {"file_name": picture.name, "height": HEIGHT, "width": WIDTH}
    content = {
        "images": [{**image, "id": 4}, {**image, "id": 9}],
        "categories": [{"id": 90, "name": "last"}, {"id": 3, "name": "first"}],
        "annotations": [
            {"id": index, "image_id": 9, "iscrowd": 0, "area": 1, **row}
            for index, row in enumerate(rows, start=1)
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_coco_file_with_gaps_and_oddities(picture: Path, tmp_path: Path) -> None:
    box = {"bbox": [10, 5, 21, 21]}
    path = coco_file(
        tmp_path,
        picture,
        [
            {**box, "category_id": 90, "segmentation": [TRIANGLE]},
            {**box, "category_id": 3, "segmentation": uncompressed(MASK)},
            {**box, "category_id": 3, "segmentation": compressed(MASK), "iscrowd": 1},
            {**box, "category_id": 3, "segmentation": [TRIANGLE[:5]]},
            {**box, "category_id": 90, "segmentation": [TRIANGLE, TRIANGLE[:4]]},
            {**box, "category_id": 3, "segmentation": rle([3, 4])},
            {**box, "category_id": 3, "segmentation": []},
            {**box, "category_id": 3, "segmentation": [TRIANGLE], "image_id": 5},
            {"category_id": 3, "segmentation": [TRIANGLE]},
        ],
    )
    assert register_coco_json("mapper_test", path, picture.parent) == ["first", "last"]
    empty, full = DatasetCatalog.get("mapper_test")
    DatasetCatalog.remove("mapper_test")
    MetadataCatalog.remove("mapper_test")

    counts = IssueCounter()
    file = read_coco(path, picture.parent)
    counts.add(file.settled)
    for record, classes in ((empty, []), (full, [1, 0, 1, 0])):
        found = mapper(recompute_boxes=True)(record)
        assert found["instances"].gt_classes.tolist() == classes
        counts.add(found["data_issues"])
    # The last one has the box of its triangle.
    assert full["annotations"][-1]["bbox"] == [10.0, 5.0, 20.5, 20.25]
    assert counts.counts == {
        issue_policies.IMAGE_TWICE: 1,
        issue_policies.NO_ANNOTATION: 1,
        issue_policies.CROWD: 1,
        issue_policies.MALFORMED_MASK: 2,
        issue_policies.MALFORMED_PART: 1,
        issue_policies.NO_MASK: 1,
        issue_policies.UNLISTED_IMAGE: 1,
        issue_policies.BOX_FROM_MASK: 1,
        issue_policies.OBJECT_TWICE: 1,  # the box taken from the mask is the same triangle's
    }


def test_unknown_categories_stop(picture: Path, tmp_path: Path) -> None:
    row = {"bbox": [1, 1, 2, 2], "category_id": 4, "segmentation": [TRIANGLE]}
    path = coco_file(tmp_path, picture, [row])
    with pytest.raises(ValueError, match=r"without a known category_id: annotations\[0\].*: 4"):
        register_coco_json("mapper_test_unknown", path, picture.parent)
