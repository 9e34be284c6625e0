"""The doctor of data sets: each illness with its remedy, and repaired copies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.data import issue_policies
from focalnet_det.data.doctor.coco_doctor import fix_coco, verify_coco
from focalnet_det.data.doctor.findings import Finding
from focalnet_det.data.doctor.folder_doctor import verify_folders
from focalnet_det.data.doctor.image_checks import near_duplicates, read_summaries
from focalnet_det.data.doctor.panoptic_doctor import verify_panoptic
from focalnet_det.data.io.coco_files import read_coco
from focalnet_det.data.io.issues import DataError
from focalnet_det.data.semantic.label_folders import ClassList
from focalnet_det.data.shapes.generate import make_shapes
from tests.helpers import bad_files
from tests.helpers.bad_files import Change, both, drop, put, run_tool

ALL = ("annotations", "*")
# Every third object, so that corners and sizes cannot be mixed up.
CORNERS = [(2, 3, 40, 30), (20, 12, 44, 30), (5, 5, 47, 31)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return bad_files.write_images(tmp_path / "images")


def write(folder: Path, change: Change = lambda _: None, name: str = "a.json") -> Path:
    content = bad_files.coco()
    change(content)
    return bad_files.write_json(folder / name, content)


def corners(content: Any) -> None:
    """Boxes as left, top, right, bottom, without masks."""
    for number, row in enumerate(content["annotations"]):
        row["bbox"] = list(CORNERS[number % 3])
        row["segmentation"] = []


def named(findings: list[Finding], part: str) -> Finding:
    (found,) = [finding for finding in findings if part in finding.problem]
    return found


def test_a_sound_file_has_a_note_at_most(tmp_path: Path, images: Path) -> None:
    findings = verify_coco(write(tmp_path), images)
    # Three objects of a class are few, as hotcoco says; nothing else is found.
    assert [finding.fatal for finding in findings] == [False]
    assert named(findings, "fewer than 10 objects").examples == ("a", "b")


@pytest.mark.parametrize(
    ("change", "problem", "remedy", "fatal"),
    [
        (corners, "look like [left, top", "--fix does", True),
        (put("images", 1, "id", 10), "duplicate image ids", "unique id", True),
        (put(*ALL, "id", 1), issue_policies.NO_ID, "renumbered", False),
        (
            put("annotations", 1, "area", 0),
            issue_policies.AREA_REPLACED,
            "computed from the mask",
            False,
        ),
        (put("annotations", 1, "bbox", [40, 3, 30, 9]), "extend beyond", "clipped", False),
        (put("annotations", 1, "bbox", None), issue_policies.BOX_FROM_MASK, "bounding box", False),
        (put("annotations", 1, "segmentation", "abc"), "malformed mask", "polygons", True),
        (put(*ALL, "category_id", 1), "classes without objects", "Add images", False),
        (put("images", 1, "file_name", "absent.png"), "missing images", "image folder", True),
        (put("images", 1, "width", 50), "size differs", "upright image", True),
    ],
)
def test_problems(
    change: Change, problem: str, remedy: str, fatal: bool, tmp_path: Path, images: Path
) -> None:
    found = named(verify_coco(write(tmp_path, change), images), problem)
    assert remedy in found.remedy
    assert found.fatal == fatal


def test_pictures(tmp_path: Path, images: Path) -> None:
    (images / "0.png").write_bytes(b"x")
    rgba = Image.open(images / "1.png").convert("RGBA")
    rgba.putalpha(100)
    rgba.save(images / "1.png")
    findings = verify_coco(write(tmp_path), images)
    assert named(findings, "unreadable images").fatal
    assert named(findings, issue_policies.TRANSPARENT).examples == (str(images / "1.png"),)


def test_odd_sizes(tmp_path: Path) -> None:
    images = bad_files.write_images(tmp_path / "images")
    Image.new("RGB", (400, 15)).save(images / "1.png")
    change = both(drop("images", "*", "width"), drop("images", "*", "height"))
    findings = verify_coco(write(tmp_path, change), images)
    for part in ("a side below 16 pixels", "aspect ratio above 10"):
        assert named(findings, part).examples == (str(images / "1.png"),)


def test_images_in_both_splits(tmp_path: Path) -> None:
    """A copy that was compressed and resized is found; other images of the set are not."""
    root = make_shapes(tmp_path / "shapes", train=12, val=6, size=(96, 96), seed=0, workers=1)
    files = [root / f"annotations/instances_{split}.json" for split in ("train", "val")]
    folders = [root / "images/train", root / "images/val"]
    arguments = (files[0], folders[0], files[1], folders[1])
    assert not [f for f in verify_coco(*arguments) if "near-duplicate" in f.problem]
    source = sorted(folders[0].iterdir())[3]
    target = sorted(folders[1].iterdir())[2]
    image = Image.open(source)
    image.resize((96, 96)).save(target, quality=40)
    found = named(verify_coco(*arguments), "near-duplicate images shared by")
    assert found.fatal
    assert found.examples == (f"{source} and {target}",)


def test_plain_pictures_are_not_alike(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (32, 32), (number, number, number)).save(tmp_path / f"{number}.png")
    pictures, _ = read_summaries([str(path) for path in sorted(tmp_path.iterdir())])
    assert near_duplicates(pictures) == []


def test_classes_of_one_split(tmp_path: Path, images: Path) -> None:
    first = write(tmp_path)
    second = write(tmp_path, put(*ALL, "category_id", 1), "b.json")
    findings = verify_coco(first, images, second, images)
    assert named(findings, f"without objects in {second}").examples == ("b",)
    other = write(tmp_path, put("categories", 1, "name", "c"), "c.json")
    found = named(verify_coco(first, images, other, images), "different categories")
    assert found.fatal
    assert found.examples == ("b", "c")


def test_corners_are_mended(tmp_path: Path, images: Path) -> None:
    target = tmp_path / "fixed.json"
    done = fix_coco(write(tmp_path, corners), images, target)
    assert done[0] == "7 boxes converted from corners to [x, y, width, height]."
    rows = read_coco(target, images, evaluation=True).annotations
    assert [row["bbox"] for row in rows[:3]] == [[2, 3, 38, 27], [20, 12, 24, 18], [5, 5, 42, 26]]
    assert rows[0]["area"] == 38 * 27


def test_a_repaired_copy_has_nothing_to_repair(tmp_path: Path, images: Path) -> None:
    change = both(
        both(put(*ALL, "id", 1), put("annotations", 0, "area", 0)),
        both(
            both(put("annotations", 1, "bbox", None), drop("images", 0, "width")),
            both(put("annotations", 2, "image_id", 99), put("annotations", 3, "segmentation", "x")),
        ),
    )
    target = tmp_path / "fixed.json"
    done = fix_coco(write(tmp_path, change), images, target)
    assert "1 annotations without a valid box or mask removed." in done
    assert len(done) == 6
    file = read_coco(target, images, evaluation=True)
    assert set(file.issues) == {issue_policies.CROWD}
    assert [row["id"] for row in file.annotations] == [1, 2, 4, 5, 6]
    assert file.annotations[1]["bbox"] == [5.5, 3.0, 12.0, 12.0]
    before = target.read_bytes()
    assert fix_coco(target, images, tmp_path / "again.json") == []
    assert not (tmp_path / "again.json").exists()
    assert target.read_bytes() == before


def test_what_cannot_be_mended_stays(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path, put("images", 1, "id", 10))
    with pytest.raises(DataError, match="duplicate image ids"):
        fix_coco(path, images, tmp_path / "fixed.json")
    assert not (tmp_path / "fixed.json").exists()
    with pytest.raises(ValueError, match="writes a copy"):
        fix_coco(path, images, path)


def test_label_folders_in_both_splits(tmp_path: Path) -> None:
    images = bad_files.write_images(tmp_path / "images")
    labels = tmp_path / "labels"
    labels.mkdir()
    for number in range(3):
        pixels = np.resize(np.array([0, 1], dtype=np.uint8), (bad_files.HEIGHT, bad_files.WIDTH))
        Image.fromarray(pixels).save(labels / f"{number}.png")
    classes = ClassList(names=("a", "b"))
    assert verify_folders(images, labels, classes) == []
    held_out = tmp_path / "val"
    held_out.mkdir()
    Image.open(images / "1.png").save(held_out / "copy.png")
    found = named(verify_folders(images, labels, classes, held_out), "training and validation")
    assert found.examples == (f"{images / '1.png'} and {held_out / 'copy.png'}",)


def test_panoptic_rows_of_another_kind(tmp_path: Path) -> None:
    content = bad_files.panoptic()
    put("annotations", 1, "segments_info", 0, "id", "1")(content)
    path = bad_files.write_json(tmp_path / "a.json", content)
    (found,) = verify_panoptic(path, tmp_path, tmp_path)
    assert "segments without id or category_id" in found.problem
    assert found.fatal


def test_command_line(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = write(tmp_path, corners), tmp_path / "fixed.json"
    options = ("--coco-json", path, "--images", images)
    assert run_tool(*options) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"ERROR: {path}: boxes that look like [left, top, right, bottom] (6)")
    assert run_tool(*options, "--fix", target) == 1
    assert (
        f"Wrote {target}.\n7 boxes converted from corners to [x, y, width, height]."
        in capsys.readouterr().out
    )
    assert run_tool("--coco-json", target, "--images", images) == 0
    assert "fewer than 10 objects (2): a, b" in capsys.readouterr().out
    path.write_text("{")
    assert run_tool(*options) == 1
    assert "is not a JSON file" in capsys.readouterr().err
    assert run_tool("--coco-json", target) == 2
    assert json.loads(target.read_text())["categories"]


def test_panoptic_images_in_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bad_files.write_json(tmp_path / "a.json", bad_files.panoptic())
    pngs = bad_files.write_pngs(tmp_path / "pngs")
    images = bad_files.write_images(tmp_path / "images", 2)
    options = ("--panoptic-json", path, "--panoptic-root", pngs, "--images", images)
    run_tool(*options)
    assert "near-duplicate" not in capsys.readouterr().out
    assert run_tool(*options, "--val-images", images) == 0
    held_out = tmp_path / "val"
    held_out.mkdir()
    Image.open(images / "1.png").save(held_out / "copy.png")
    assert run_tool(*options, "--val-images", held_out) == 1
    out = capsys.readouterr().out
    assert f"{images / '1.png'} and {held_out / 'copy.png'}" in out
