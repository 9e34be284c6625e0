"""Every fault of a COCO file is one clear error before the first step, or a counted policy."""

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.data import issue_policies
from focalnet_det.data.io.coco_files import read_coco
from focalnet_det.data.registry import register_coco_json
from tests.helpers import bad_files
from tests.helpers.bad_coco import ALL, NAME, OBJECT, evaluate, stopped, write
from tests.helpers.bad_files import HEIGHT, NAN, WIDTH, Change, both, drop, put

pytestmark = pytest.mark.usefixtures("forget_data_sets")

# Case: change, and what the message says.
ERRORS: dict[str, tuple[Change, str]] = {
    "no images": (drop("images"), "lacks images"),
    "no categories": (drop("categories"), "lacks categories"),
    "images no list": (put("images", {"0": 1}), "images is .* not a list"),
    "images null": (put("images", None), "images is None, not a list"),
    "annotations no list": (put("annotations", 7), "annotations is 7"),
    "image no object": (put("images", 1, "x.png"), r"images\[1\] is 'x.png'"),
    "annotation no object": (put("annotations", 2, [1, 2]), r"annotations\[2\] is \[1, 2\]"),
    "annotation null": (put("annotations", 2, None), r"annotations\[2\] is None"),
    "category no object": (put("categories", 0, "a"), r"categories\[0\] is 'a'"),
    "images empty": (put("images", []), "missing images"),
    "categories empty": (put("categories", []), "missing categories"),
    "category without id": (drop("categories", 0, "id"), r"without id: categories\[0\]"),
    "category id text": (put("categories", 0, "id", "1"), r"categories without id"),
    "category id negative": (put("categories", 0, "id", -1), "categories without id"),
    "category id half": (put("categories", 0, "id", 1.5), "categories without id"),
    "category id true": (put("categories", 0, "id", True), "categories without id"),
    "category id twice": (put("categories", 1, "id", 1), "duplicate category ids"),
    "category name twice": (put("categories", 1, "name", "a"), "duplicate category names: 'a'"),
    "category without name": (drop("categories", 1, "name"), r"without name: categories\[1\]"),
    "category name number": (put("categories", 1, "name", 5), "categories without name"),
    "category name blank": (put("categories", 1, "name", "  "), "categories without name"),
    "keypoint names number": (put("categories", 0, "keypoints", 5), "malformed keypoints"),
    "keypoint names true": (put("categories", "*", "keypoints", True), "malformed keypoints"),
    "keypoint names text": (put("categories", 0, "keypoints", "eye"), "malformed keypoints"),
    "keypoint names twice": (
        put("categories", "*", "keypoints", ["eye", "eye"]),
        "categories with malformed keypoints",
    ),
    "other keypoint names": (
        put("categories", 1, "keypoints", ["left_ear", "right_ear"]),
        "categories with different keypoints",
    ),
    "image without id": (drop("images", 1, "id"), r"images without id: images\[1\]"),
    "image id text": (put("images", 1, "id", "11"), r"images without id: images\[1\]"),
    "all ids text": (
        both(put("images", "*", "id", "10"), put(*ALL, "image_id", "10")),
        r"3 x images without id.*\n.*7 x annotations without image_id",
    ),
    "image id float": (put("images", 1, "id", 1.5), "images without id"),
    "image id null": (put("images", 1, "id", None), "images without id"),
    "image id huge": (put("images", 1, "id", 2**70), "images without id"),
    "image id negative": (put("images", 1, "id", -3), "images without id"),
    "image id twice": (put("images", 1, "id", 10), r"duplicate \w+ ids: 10 at images\[0\].*\[1\]"),
    "no file_name": (drop("images", 1, "file_name"), "without file_name"),
    "file_name null": (put("images", 1, "file_name", None), "without file_name"),
    "file_name number": (put("images", 1, "file_name", 3), "without file_name"),
    "file_name empty": (put("images", 1, "file_name", ""), "without file_name"),
    "file_name nul": (put("images", 1, "file_name", "a\0b"), "without file_name"),
    "missing image": (put("images", 1, "file_name", "absent.png"), r"absent\.png"),
    "missing images": (
        put("images", "*", "file_name", "absent/0.png"),
        r"3 x missing files.*no such folder",
    ),
    "another suffix": (put("images", 1, "file_name", "1.jpg"), r"1\.jpg \(did you mean 1\.png\?\)"),
    "width text": (put("images", 1, "width", "48"), r"malformed width or height: images\[1\]"),
    "width zero": (put("images", 1, "width", 0), "malformed width or height"),
    "width negative": (put("images", 1, "width", -48), "malformed width or height"),
    "width half": (put("images", 1, "width", 47.5), "malformed width or height"),
    "height list": (put("images", 1, "height", [32]), "malformed width or height"),
    "height nan": (put("images", 1, "height", NAN), "malformed width or height"),
    "size endless": (put("images", 1, "height", 10**9), "images with too many pixels"),
    "sizes swapped": (
        both(
            drop("annotations", 6),
            both(put("images", "*", "width", HEIGHT), put("images", "*", "height", WIDTH)),
        ),
        r"3 x images whose size differs .*0\.png is 48 x 32, the file lists 32 x 48",
    ),
    "no image_id": (drop(*OBJECT, "image_id"), r"without image_id: annotations\[1\]"),
    "image_id text": (put(*OBJECT, "image_id", "10"), r"annotations\[1\] \(id 101\): '10'"),
    "image_id null": (put(*OBJECT, "image_id", None), "without image_id"),
    "image_id list": (put(*OBJECT, "image_id", [10]), "without image_id"),
    "no category_id": (drop(*OBJECT, "category_id"), "known category_id.*None"),
    "category unknown": (put(*OBJECT, "category_id", 9), r"category_id: annotations\[1\].*: 9"),
    "category text": (put(*OBJECT, "category_id", "1"), "known category_id.*'1'"),
    "category list": (put(*OBJECT, "category_id", [1]), "known category_id"),
    "iscrowd text": (put(*OBJECT, "iscrowd", "0"), "malformed iscrowd.*'0'"),
    "iscrowd two": (put(*OBJECT, "iscrowd", 2), "malformed iscrowd"),
    "iscrowd null": (put(*OBJECT, "iscrowd", None), "malformed iscrowd"),
    "ignore": (put(*OBJECT, "ignore", 1), "annotations with ignore"),
    "keypoints too few": (put(*OBJECT, "keypoints", [1, 2, 2]), "malformed keypoints"),
    "keypoints text": (put(*OBJECT, "keypoints", "1 2 2"), "malformed keypoints"),
    "keypoints nan": (put(*OBJECT, "keypoints", [NAN, 2, 2, 1, 1, 1]), "malformed keypoints"),
    "keypoint flag": (put(*OBJECT, "keypoints", [1, 2, 3, 1, 1, 1]), "malformed keypoints"),
    "keypoints unnamed": (drop("categories", "*", "keypoints"), "category without keypoint names"),
    "all boxes nan": (
        both(put(*ALL, "bbox", [NAN] * 4), put(*ALL, "segmentation", [])),
        r"7 x objects with a malformed box: annotations\[0\]",
    ),
    "all boxes text": (
        both(put(*ALL, "bbox", ["x", 1, 2, 3]), put(*ALL, "segmentation", None)),
        "objects with a malformed box",
    ),
    "all boxes missing": (
        both(drop(*ALL, "bbox"), drop(*ALL, "segmentation")),
        "objects with a malformed box",
    ),
    "all boxes negative": (
        both(put(*ALL, "bbox", [9, 9, -4, -4]), drop(*ALL, "segmentation")),
        "objects with a malformed box",
    ),
    "all masks text": (put(*ALL, "segmentation", "abc"), "objects with a malformed mask"),
    "all masks boxes": (put(*ALL, "segmentation", [[1, 2, 3, 4]]), "malformed mask"),
    "all masks far": (put(*ALL, "segmentation", [[1e9, 0, 1e9, 9, 0, 9]]), "malformed mask"),
    "xyxy that stay inside": (
        lambda c: [
            a.update(bbox=[a["bbox"][0], a["bbox"][1], a["bbox"][0] + 12, a["bbox"][1] + 12])
            for a in c["annotations"][:6]
        ],
        r"6 x boxes that look like \[left, top, right, bottom\]",
    ),
    "xyxy": (put(*ALL, "bbox", [20, 12, 44, 30]), r"look like \[left, top, right, bottom\]"),
    "relative": (put(*ALL, "bbox", [0.1, 0.2, 0.5, 0.4]), "look relative to the image size"),
    "20,000 objects": (
        lambda c: c["annotations"].extend([c["annotations"][1]] * 20_000),
        r"1\.png \(id 11\) has 20,002.*Cut the image",
    ),
}

# Of a training alone: an evaluation of crowds and background is sound.
TRAINING_ERRORS: dict[str, tuple[Change, str]] = {
    "no annotations": (drop("annotations"), "lacks annotations"),
    "all outside": (
        both(put(*ALL, "bbox", [60, 40, 10, 10]), drop(*ALL, "segmentation")),
        "without any object inside its image",
    ),
    "all empty": (
        both(put(*ALL, "bbox", [4, 4, 0, 0]), drop(*ALL, "segmentation")),
        "without any object inside its image",
    ),
}


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", sorted(ERRORS))
def test_errors(case: str, evaluation: bool, images: Path, tmp_path: Path) -> None:
    change, message = ERRORS[case]
    found = stopped(write(tmp_path, change), images, evaluation=evaluation)
    assert re.search(message, found), found


@pytest.mark.parametrize("case", sorted(TRAINING_ERRORS))
def test_errors_of_a_training_alone(case: str, images: Path, tmp_path: Path) -> None:
    change, message = TRAINING_ERRORS[case]
    path = write(tmp_path, change)
    assert re.search(message, stopped(path, images, evaluation=False))
    register_coco_json(NAME, path, images, evaluation=True)
    evaluate()


def test_all_faults_are_shown_together(images: Path, tmp_path: Path) -> None:
    change = both(
        put("images", 0, "width", "x"),
        put(*OBJECT, "category_id", 9),
        put("annotations", 2, "category_id", 8),
        put("categories", 1, "name", "a"),
    )
    lines = stopped(write(tmp_path, change), images, evaluation=False).splitlines()
    assert len(lines) == 4
    assert "2 x annotations without a known category_id" in lines[3]
    assert "annotations[1] (id 101): 9; annotations[2] (id 102): 8" in lines[3]
    assert lines[3].endswith("Add the category, or correct the id.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON file"),
        (b"{", "not a JSON file"),
        (b"\xff\xfe\x00", "not a JSON file"),
        (b"<html>404</html>", "not a JSON file"),
        (b"[]", "contains a list instead of an object, and lacks annotations, categories, images"),
        (b"null", "contains a NoneType"),
        (b"[" * 100_000, "not a JSON file"),
        (b"{}", "lacks annotations, categories, images"),
        (b'{"images": ' + b"1" * 5000 + b"}", "not a JSON file"),
    ],
)
def test_files_that_are_no_coco(content: bytes, message: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    assert re.search(message, stopped(tmp_path / "bad.json", images, evaluation=False))


def test_paths_that_are_no_files(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Annotation file .* does not exist"):
        register_coco_json(NAME, tmp_path / "absent.json", images)
    with pytest.raises(ValueError, match="Image folder .* does not exist"):
        register_coco_json(NAME, write(tmp_path, lambda _: None), tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        register_coco_json(NAME, images, images)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="is a device or a pipe"):
        register_coco_json(NAME, tmp_path / "pipe.json", images)


def test_a_byte_order_mark_is_no_fault(images: Path, tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(bad_files.coco())
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert register_coco_json(NAME, tmp_path / "a.json", images) == ["a", "b"]


def test_real_files_are_not_blamed(shared_data: Path) -> None:
    """Thin polygons, crowds and boxes of official annotations, as they are."""
    for path in sorted(shared_data.glob("*/annotations/instances_*.json")):
        assert set(read_coco(path, evaluation=True).issues) <= {issue_policies.CROWD}, path
