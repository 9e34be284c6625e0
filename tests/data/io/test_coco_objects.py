"""Faults of single objects of a COCO file: repaired or dropped, and counted."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from detectron2.data import MetadataCatalog

from focalnet_det.data import issue_policies
from focalnet_det.data.io.coco_files import read_coco
from focalnet_det.data.registry import register_coco_json
from tests.helpers import bad_files
from tests.helpers.bad_coco import ALL, NAME, OBJECT, evaluate, stopped, use_all, write
from tests.helpers.bad_files import HEIGHT, INFINITY, NAN, WIDTH, Change, both, drop, put

pytestmark = pytest.mark.usefixtures("forget_data_sets")


CIRCLE = [
    round(float(v), 3)
    for angle in np.linspace(0, 2 * np.pi, 100_000)
    for v in (48 + 40 * np.cos(angle * 4999), 48 + 40 * np.sin(angle * 4999))
]

FULL_RLE = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}

# Case: change, and problems of ``ISSUE_POLICIES`` that are counted; a training can use the rest.
COUNTED: dict[str, tuple[Change, dict[str, int]]] = {
    "sound": (lambda _: None, {}),
    "float sizes": (put("images", 1, "width", 48.0), {}),
    "no sizes": (
        both(drop("images", "*", "width"), drop("images", "*", "height")),
        {issue_policies.NO_SIZE: 3},
    ),
    "width null": (put("images", 1, "width", None), {issue_policies.NO_SIZE: 1}),
    "no width": (drop("images", 1, "width"), {issue_policies.NO_SIZE: 1}),
    "same file": (put("images", 1, "file_name", "0.png"), {issue_policies.IMAGE_TWICE: 1}),
    "unlisted image": (put(*OBJECT, "image_id", 77), {issue_policies.UNLISTED_IMAGE: 1}),
    "all unlisted but one": (
        lambda c: [a.update(image_id=77) for a in c["annotations"][1:]],
        {issue_policies.UNLISTED_IMAGE: 6},
    ),
    "no id": (drop(*OBJECT, "id"), {issue_policies.NO_ID: 1}),
    "no ids": (drop(*ALL, "id"), {issue_policies.NO_ID: 7}),
    "id twice": (put(*OBJECT, "id", 100), {issue_policies.NO_ID: 1}),
    "ids the same": (put(*ALL, "id", 1), {issue_policies.NO_ID: 6}),
    "id text": (put(*OBJECT, "id", "101"), {issue_policies.NO_ID: 1}),
    "id negative": (put(*OBJECT, "id", -1), {issue_policies.NO_ID: 1}),
    "no bbox": (drop(*OBJECT, "bbox"), {issue_policies.BOX_FROM_MASK: 1}),
    "no bboxes": (drop(*ALL, "bbox"), {issue_policies.BOX_FROM_MASK: 7}),
    "bbox empty": (put(*OBJECT, "bbox", []), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox null": (put(*OBJECT, "bbox", None), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox text": (put(*OBJECT, "bbox", ["x", 1, 2, 3]), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox numbers as text": (
        put(*OBJECT, "bbox", ["1", "1", "2", "3"]),
        {issue_policies.BOX_FROM_MASK: 1},
    ),
    "bbox nan": (put(*OBJECT, "bbox", [NAN, 1, 2, 3]), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox infinite": (put(*OBJECT, "bbox", [1, 1, INFINITY, 3]), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox huge": (put(*OBJECT, "bbox", [1, 1, 10**400, 3]), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox negative": (put(*OBJECT, "bbox", [9, 9, -3, 3]), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox three": (put(*OBJECT, "bbox", [9, 9, 3]), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox nested": (put(*OBJECT, "bbox", [[9, 9, 3, 3]]), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox object": (put(*OBJECT, "bbox", {"x": 1}), {issue_policies.BOX_FROM_MASK: 1}),
    "bbox true": (put(*OBJECT, "bbox", [True] * 4), {issue_policies.BOX_FROM_MASK: 1}),
    "no area": (drop(*OBJECT, "area"), {issue_policies.AREA_REPLACED: 1}),
    "no areas": (drop(*ALL, "area"), {issue_policies.AREA_REPLACED: 7}),
    "area zero": (put(*OBJECT, "area", 0), {issue_policies.AREA_REPLACED: 1}),
    "area negative": (put(*OBJECT, "area", -4), {issue_policies.AREA_REPLACED: 1}),
    "area nan": (put(*OBJECT, "area", NAN), {issue_policies.AREA_REPLACED: 1}),
    "area text": (put(*OBJECT, "area", "144"), {issue_policies.AREA_REPLACED: 1}),
    "area too large": (put(*OBJECT, "area", 5000.0), {issue_policies.AREA_REPLACED: 1}),
    "area null": (put(*OBJECT, "area", None), {issue_policies.AREA_REPLACED: 1}),
    "part of two points": (
        put(*OBJECT, "segmentation", [bad_files.square(5.5, 3, 12), [1, 2, 3, 4]]),
        {issue_policies.MALFORMED_PART: 1},
    ),
    "part with text": (
        put(*OBJECT, "segmentation", [bad_files.square(5.5, 3, 12), ["a"] * 6]),
        {issue_policies.MALFORMED_PART: 1},
    ),
    "part null": (
        put(*OBJECT, "segmentation", [bad_files.square(5.5, 3, 12), None]),
        {issue_policies.MALFORMED_PART: 1},
    ),
    "object twice": (
        lambda c: c["annotations"].append({**c["annotations"][1], "id": 999}),
        {issue_policies.OBJECT_TWICE: 1},
    ),
    "box elsewhere": (put(*OBJECT, "bbox", [40, 3, 12, 12]), {issue_policies.BOX_CONTRADICTS: 1}),
    "box empty": (
        put(*OBJECT, "bbox", [4, 3, 0, 12]),
        {issue_policies.AREA_REPLACED: 1, issue_policies.BOX_CONTRADICTS: 1},
    ),
    "no iscrowd": (drop(*ALL, "iscrowd"), {}),
    "iscrowd true": (put(*OBJECT, "iscrowd", True), {}),
    "no keypoints": (drop("annotations", 1, "keypoints"), {}),
    "keypoints null": (put(*OBJECT, "keypoints", None), {}),
    "more keys": (put("info", {"x": [1]}), {}),
    "empty image": (lambda c: c["annotations"].__delitem__(slice(1, 6, 3)), {}),
}

# Case: change, and problems for which a training drops the object, and an evaluation stops.
DROPPED: dict[str, tuple[Change, str]] = {
    f"{name} alone": (both(change, put(*OBJECT, "segmentation", [])), issue_policies.MALFORMED_BOX)
    for name, (change, issues) in COUNTED.items()
    if issues == {issue_policies.BOX_FROM_MASK: 1}
} | {
    "mask text": (put(*OBJECT, "segmentation", "abc"), issue_policies.MALFORMED_MASK),
    "mask number": (put(*OBJECT, "segmentation", 7), issue_policies.MALFORMED_MASK),
    "mask true": (put(*OBJECT, "segmentation", True), issue_policies.MALFORMED_MASK),
    "mask flat": (put(*OBJECT, "segmentation", [1, 2, 9, 2, 9, 9]), issue_policies.MALFORMED_MASK),
    "mask odd": (
        put(*OBJECT, "segmentation", [[1, 2, 9, 2, 9, 9, 1]]),
        issue_policies.MALFORMED_MASK,
    ),
    "mask of box": (put(*OBJECT, "segmentation", [[1, 2, 9, 9]]), issue_policies.MALFORMED_MASK),
    "mask nan": (
        put(*OBJECT, "segmentation", [[1, 2, NAN, 2, 9, 9]]),
        issue_policies.MALFORMED_MASK,
    ),
    "mask infinite": (put(*OBJECT, "segmentation", [[1, 2, INFINITY, 2, 9, 9]]), "malformed mask"),
    "mask huge": (put(*OBJECT, "segmentation", [[1, 2, 10**400, 2, 9, 9]]), "malformed mask"),
    "mask nested": (put(*OBJECT, "segmentation", [[[1, 2], [9, 2], [9, 9]]]), "malformed mask"),
    "mask far": (
        put(*OBJECT, "segmentation", [[1, 2, 1e8, 2, 9, 9]]),
        issue_policies.MALFORMED_MASK,
    ),
    "mask endless": (put(*OBJECT, "segmentation", [CIRCLE]), issue_policies.MALFORMED_MASK),
    "rle no counts": (
        put(*OBJECT, "segmentation", {"size": [32, 48]}),
        issue_policies.MALFORMED_MASK,
    ),
    "rle no size": (
        put(*OBJECT, "segmentation", {"counts": [1536]}),
        issue_policies.MALFORMED_MASK,
    ),
    "rle other size": (
        put(*OBJECT, "segmentation", {"size": [48, 32], "counts": [0, 1536]}),
        issue_policies.MALFORMED_MASK,
    ),
    "rle short": (
        put(*OBJECT, "segmentation", {**FULL_RLE, "counts": [3, 4]}),
        issue_policies.MALFORMED_MASK,
    ),
    "rle long": (
        put(*OBJECT, "segmentation", {**FULL_RLE, "counts": [3, 9999]}),
        issue_policies.MALFORMED_MASK,
    ),
    "rle negative": (
        put(*OBJECT, "segmentation", {**FULL_RLE, "counts": [-4, 1540]}),
        issue_policies.MALFORMED_MASK,
    ),
    "rle text": (put(*OBJECT, "segmentation", {**FULL_RLE, "counts": "\x7f"}), "malformed mask"),
    "rle cut": (put(*OBJECT, "segmentation", {**FULL_RLE, "counts": "ZZ"}), "malformed mask"),
    "rle endless": (
        put(*OBJECT, "segmentation", {**FULL_RLE, "counts": "o" * 30 + "0"}),
        issue_policies.MALFORMED_MASK,
    ),
    "rle null": (put(*OBJECT, "segmentation", {**FULL_RLE, "counts": None}), "malformed mask"),
}


@pytest.mark.parametrize("case", sorted(COUNTED))
def test_counted(case: str, images: Path, tmp_path: Path) -> None:
    change, expected = COUNTED[case]
    path = write(tmp_path, change)
    for evaluation in (False, True):
        assert register_coco_json(NAME, path, images, evaluation=evaluation) == ["a", "b"]
        assert MetadataCatalog.get(NAME).file_issues == expected
    use_all()
    assert evaluate()["bbox"]["AP"] == 0


@pytest.mark.parametrize("case", sorted(DROPPED))
def test_dropped_in_training_and_stopped_in_evaluation(
    case: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, problem = DROPPED[case]
    path = write(tmp_path, change)
    register_coco_json(NAME, path, images)
    assert f"1 x {problem} (dropped)" in caplog.text
    use_all()
    assert f"objects with a {problem}: annotations[1]" in stopped(path, images, evaluation=True)


def test_repaired_numbers(images: Path, tmp_path: Path) -> None:
    """Boxes and areas that are taken from the masks, by hand."""
    change = both(
        drop("annotations", 0, "bbox"),
        put("annotations", 1, "area", 0),
        both(put("annotations", 2, "area", 0), drop("annotations", 2, "segmentation")),
    )
    path = write(tmp_path, change)
    file = read_coco(path)
    assert file.annotations[0]["bbox"] == [4.5, 3.0, 12.0, 12.0]
    # A square of 12 pixels a side, from 5.5 to 17.5; and the box of the third object.
    assert file.annotations[1]["area"] == pytest.approx(144, abs=12)
    assert file.annotations[2]["area"] == 144.0
    assert "bbox" not in json.loads(path.read_text())["annotations"][0]
