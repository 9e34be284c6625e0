"""The generated data set: bytes, labels against each other, and its rules."""

from __future__ import annotations

import hashlib
import json
import logging
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focalnet_det.data.shapes import export as shapes_export
from focalnet_det.data.shapes import generate as shapes
from focalnet_det.data.shapes.generate import STUFF_CLASSES, THING_CLASSES, make_shapes, parse_size
from focalnet_det.data.shapes.scene import FIRST_OBJECT, Outline, coverage, draw_scene
from tests.helpers.paths import ROOT

# Seed 4 holds a crowd in both splits and unlabelled pixels in train.
PARAMETERS: dict[str, Any] = {"train": 24, "val": 6, "size": (160, 128), "seed": 4}
TINY: dict[str, Any] = {"train": 2, "val": 1, "size": (64, 64), "seed": 0, "workers": 1}
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", workers=2, **PARAMETERS)


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [draw_scene(np.random.default_rng(number), 192, 192) for number in range(60)]


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def load(root: Path, kind: str, split: str) -> Any:
    return json.loads((root / "annotations" / f"{kind}_{split}.json").read_text())


def id_map(root: Path, split: str, file_name: str) -> np.ndarray:
    rgb = np.asarray(Image.open(root / f"panoptic_{split}" / file_name), dtype=np.int64)
    return rgb @ np.array([1, 256, 65536])


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["image_id"], row["category_id"], row["iscrowd"], row["area"], tuple(row["bbox"])


def segments(root: Path, split: str) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Every panoptic segment of a split with its mask."""
    found = []
    for annotation in load(root, "panoptic", split)["annotations"]:
        ids = id_map(root, split, annotation["file_name"])
        for segment in annotation["segments_info"]:
            row = {**segment, "image_id": annotation["image_id"]}
            found.append((row, ids == segment["id"]))
    return found


def test_one_worker_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = make_shapes(tmp_path / "again", workers=1, **PARAMETERS)
    assert digests(again) == digests(root)


def test_seed_changes_the_pictures_and_counts_do_not(tmp_path: Path) -> None:
    first = digests(make_shapes(tmp_path / "a", **TINY))
    longer = digests(make_shapes(tmp_path / "b", **{**TINY, "train": 3}))
    other = digests(make_shapes(tmp_path / "c", **{**TINY, "seed": 1}))
    for name in (name for name in first if name.startswith("images")):
        assert first[name] == longer[name]
        assert first[name] != other[name]


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_there_and_of_the_right_size(root: Path, split: str) -> None:
    images = load(root, "instances", split)["images"]
    assert len(images) == PARAMETERS[split]
    stems = {Path(image["file_name"]).stem for image in images}
    for name, folder in shapes_export.output_folders(root, split).items():
        files = list(folder.iterdir())
        assert {path.stem for path in files} == stems, name
        assert all(Image.open(path).size == PARAMETERS["size"] for path in files)
    assert {(image["width"], image["height"]) for image in images} == {PARAMETERS["size"]}


@pytest.mark.parametrize("split", SPLITS)
def test_instances_are_the_thing_segments(root: Path, split: str) -> None:
    annotations = load(root, "instances", split)["annotations"]
    things = [row for row, _ in segments(root, split) if row["category_id"] < 20]
    assert Counter(map(key, annotations)) == Counter(map(key, things))
    assert sum(row["iscrowd"] for row in annotations) >= 1
    assert len({row["id"] for row in annotations}) == len(annotations)


@pytest.mark.parametrize("split", SPLITS)
def test_masks_areas_and_boxes(root: Path, split: str) -> None:
    coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
    by_key = {key(row): mask for row, mask in segments(root, split)}
    kinds: Counter[str] = Counter()
    for row in coco.loadAnns(coco.getAnnIds()):
        mask = by_key[key(row)]
        ys, xs = np.nonzero(mask)
        left, top = xs.min(), ys.min()
        assert row["bbox"] == [left, top, xs.max() - left + 1, ys.max() - top + 1]
        assert row["area"] == mask.sum()
        decoded = coco.annToMask(row).astype(bool)
        if isinstance(row["segmentation"], dict):
            assert isinstance(row["segmentation"]["counts"], str)
            kinds["crowd" if row["iscrowd"] else "rle"] += 1
            assert (decoded == mask).all()
        else:
            kinds["polygon"] += 1
            assert (decoded & mask).sum() / (decoded | mask).sum() >= 0.97
    assert kinds["polygon"] > kinds["rle"] > 0
    assert kinds["crowd"] > 0


@pytest.mark.parametrize("split", SPLITS)
def test_panoptic_ids_are_complete(root: Path, split: str) -> None:
    panoptic = load(root, "panoptic", split)
    known = {row["id"]: row["isthing"] for row in panoptic["categories"]}
    voids = 0
    for annotation in panoptic["annotations"]:
        ids = id_map(root, split, annotation["file_name"])
        rows = annotation["segments_info"]
        assert set(np.unique(ids)) - {0} == {row["id"] for row in rows}
        assert len({row["id"] for row in rows}) == len(rows)
        stuff = [row["category_id"] for row in rows if not known[row["category_id"]]]
        assert len(set(stuff)) == len(stuff)
        voids += int((ids == 0).sum())
    assert voids > 0 or split == "val"


@pytest.mark.parametrize("split", SPLITS)
def test_semantic_maps_follow_from_the_panoptic_ones(root: Path, split: str) -> None:
    table = {row["id"]: row for row in json.loads((root / "categories.json").read_text())}
    assert [row["ade_label"] for row in table.values()] == list(range(1, 11))
    folders = shapes_export.output_folders(root, split)
    for annotation in load(root, "panoptic", split)["annotations"]:
        ids = id_map(root, split, annotation["file_name"])
        ade = np.zeros(ids.shape, dtype=np.uint8)
        semseg = np.full(ids.shape, 255, dtype=np.uint8)
        for segment in annotation["segments_info"]:
            row = table[segment["category_id"]]
            ade[ids == segment["id"]] = row["ade_label"]
            semseg[ids == segment["id"]] = row["panoptic_semseg_label"]
        name = annotation["file_name"]
        assert (np.asarray(Image.open(folders["ade_labels"] / name)) == ade).all()
        assert (np.asarray(Image.open(folders["semseg"] / name)) == semseg).all()


def test_categories_have_gaps_and_agree(root: Path) -> None:
    rows = json.loads((root / "categories.json").read_text())
    assert [row["name"] for row in rows] == [*THING_CLASSES, *STUFF_CLASSES]
    ids = [row["id"] for row in rows]
    assert ids == sorted(set(ids))
    assert ids != list(range(1, len(ids) + 1))
    things = load(root, "instances", "train")["categories"]
    assert [row["id"] for row in things] == ids[: len(THING_CLASSES)]
    assert [row["id"] for row in load(root, "panoptic", "val")["categories"]] == ids
    numbers = [{row["id"] for row in load(root, "instances", s)["images"]} for s in SPLITS]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize("library", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ground_truth_as_prediction_is_perfect(root: Path, library: str, kind: str) -> None:
    coco_class, eval_class = {
        "pycocotools": (COCO, COCOeval),
        "hotcoco": (hotcoco.COCO, hotcoco.COCOeval),
    }[library]
    truth = coco_class(str(root / "annotations" / "instances_train.json"))
    rows = load(root, "instances", "train")["annotations"]
    masks = COCO(str(root / "annotations" / "instances_train.json"))
    results = []
    for row in (row for row in rows if not row["iscrowd"]):
        result = {"image_id": row["image_id"], "category_id": row["category_id"], "score": 0.9}
        found = {"bbox": row["bbox"]} if kind == "bbox" else {"segmentation": masks.annToRLE(row)}
        results.append({**result, **found})
    evaluation = eval_class(truth, truth.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_objects_occlude_each_other_but_stay_visible(scenes: list[Any]) -> None:
    occluded = 0
    for scene in scenes:
        areas = np.bincount(scene.owner.ravel(), minlength=FIRST_OBJECT)[FIRST_OBJECT:]
        assert len(areas) == len(scene.objects)
        assert sum(not item.crowd for item in scene.objects) in range(2, 9)
        for area, item in zip(areas, scene.objects, strict=True):
            assert area >= max(30, 0.6 * item.full_area)
        occluded += any(a < 0.9 * o.full_area for a, o in zip(areas, scene.objects, strict=True))
    assert occluded / len(scenes) > 0.5


def test_classes_are_balanced_and_all_stuff_occurs(scenes: list[Any]) -> None:
    things = Counter(item.class_index for scene in scenes for item in scene.objects)
    assert min(things[index] for index in range(len(THING_CLASSES))) > 20
    stuff = {int(v) for scene in scenes for v in np.unique(scene.owner) if 0 < v < FIRST_OBJECT}
    assert stuff == set(range(1, FIRST_OBJECT))


def test_coverage_of_a_square_with_a_hole() -> None:
    outer = np.array([(2, 2), (10, 2), (10, 10), (2, 10)], dtype=np.float32)
    hole = np.array([(4, 4), (8, 4), (8, 8), (4, 8)], dtype=np.float32)
    expected = np.zeros((12, 12))
    expected[2:10, 2:10] = 1
    expected[4:8, 4:8] = 0
    found = coverage(Outline(outer, hole), (0, 0, 12, 12))
    # fillPoly paints the samples that its curves touch: up to one of four per side.
    assert np.abs(found - expected).max() <= 0.5
    assert ((found > 0.5) == expected.astype(bool)).mean() > 0.97


def test_same_parameters_keep_the_data_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_shapes(tmp_path / "shapes", **TINY)
    before = (root / "dataset.json").stat().st_mtime_ns, digests(root)
    with caplog.at_level(logging.INFO):
        make_shapes(root, **TINY)
    assert "already exists" in caplog.text
    assert ((root / "dataset.json").stat().st_mtime_ns, digests(root)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes"]


def test_other_parameters_need_force(tmp_path: Path) -> None:
    root = make_shapes(tmp_path / "shapes", **TINY)
    before = digests(root)
    with pytest.raises(FileExistsError, match=r"seed.*--force"):
        make_shapes(root, **{**TINY, "seed": 3})
    assert digests(root) == before
    make_shapes(root, **{**TINY, "seed": 3}, force=True)
    assert json.loads((root / "dataset.json").read_text())["seed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes"]


def test_foreign_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a generated dataset"):
        make_shapes(tmp_path, **TINY, force=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("present", [False, True])
def test_interruption_leaves_no_half_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool
) -> None:
    root = tmp_path / "shapes"
    before = digests(make_shapes(root, **TINY)) if present else {}
    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return shapes_export.write_sample(*args)

    monkeypatch.setattr(shapes, "write_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(root, **{**TINY, "seed": 5}, force=True)
    assert digests(root) == before
    assert [path.name for path in tmp_path.iterdir()] == (["shapes"] if present else [])


@pytest.mark.parametrize(
    "change", [{"train": 0}, {"size": (32, 192)}, {"seed": -1}, {"workers": 0}]
)
def test_bad_parameters_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        make_shapes(tmp_path / "shapes", **{**TINY, **change})
    assert not list(tmp_path.iterdir())


def test_parse_size() -> None:
    assert parse_size("192") == (192, 192)
    assert parse_size("256x128") == (256, 128)
    for bad in ("", "x", "1x2x3", "-5", "a"):
        with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
            parse_size(bad)


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(ROOT / "datasets" / "make_shapes.py")
    arguments = ["--val=1", "--train=1", "--size=64", "--workers=1"]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")
    assert (tmp_path / "shapes" / "dataset.json").is_file()
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--seed=2"])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(script, run_name="__main__")
    assert refused.value.code == 1
