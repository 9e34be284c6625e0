"""Panoptic data: preparation, registration, loading and the check of data sets."""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog

from focalnet_det.data.augmentation import evaluation_resize
from focalnet_det.data.doctor.panoptic_doctor import verify_panoptic
from focalnet_det.data.io.write_image import run_jobs
from focalnet_det.data.loader import build_test_loader, build_train_loader
from focalnet_det.data.panoptic import panoptic_sets
from focalnet_det.data.panoptic.ade20k_objects import (
    THING_NUMBERS,
    prepare_ade20k_instances,
    prepare_ade20k_panoptic,
)
from focalnet_det.data.panoptic.coco_panoptic import prepare_coco_panoptic
from focalnet_det.data.panoptic.panoptic_sets import (
    PanopticFiles,
    register_coco_panoptic,
    register_panoptic_json,
    register_shapes_panoptic,
)
from focalnet_det.data.panoptic.segments import read_panoptic_json, read_segment_ids
from focalnet_det.data.shapes.generate import make_shapes

ROOT = Path(__file__).resolve().parents[2]
NAME = "test_panoptic_data"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    # Enough images that some hold a crowd, and some a smudge of no class.
    return make_shapes(root, train=60, val=3, size=(96, 80), seed=3, workers=1)


@pytest.fixture(scope="module")
def coco(shapes: Path) -> Path:
    """The shapes in COCO's layout."""
    root = shapes.parent / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").symlink_to(shapes / "images" / split)
        (root / f"panoptic_{split}2017").symlink_to(shapes / f"panoptic_{split}")
        for kind in ("panoptic", "instances"):
            target = root / f"annotations/{kind}_{split}2017.json"
            target.symlink_to(shapes / f"annotations/{kind}_{split}.json")
    return root


FORMS = ("panoptic_stuff", "panoptic_semseg")
SPLITS = ("train2017", "val2017")


def prepare(coco: Path, workers: int = 1) -> int:
    return prepare_coco_panoptic(coco, forms=FORMS, splits=SPLITS, workers=workers)


def test_semantic_labels_equal_those_that_shapes_were_drawn_with(coco: Path, shapes: Path) -> None:
    assert prepare(coco) == 2 * 63
    for split in ("train", "val"):
        files = sorted((coco / f"panoptic_stuff_{split}2017").iterdir())
        assert len(files) == (60 if split == "train" else 3)
        for path in files:
            drawn = pixels(shapes / f"panoptic_semseg_{split}" / path.name)
            assert (pixels(path) == drawn).all()
            folder = {"train": "training", "val": "validation"}[split]
            ade = pixels(shapes / "ade/annotations" / folder / path.name)
            found = pixels(coco / f"panoptic_semseg_{split}2017" / path.name)
            assert (found == np.where(ade == 0, 255, ade - 1)).all()
    assert (pixels(files[0]) == 255).sum() < pixels(files[0]).size


def test_preparation_continues_and_changes_nothing_that_is_there(coco: Path) -> None:
    prepare(coco)
    folder = coco / "panoptic_stuff_train2017"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    lost = sorted(before)[7]
    (folder / lost).unlink()
    assert prepare(coco) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    now = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in now if now[name] != times[name]} == {lost}
    assert prepare(coco) == 0


def run_script(name: str, *arguments: object) -> int:
    """Exit status of a script in this process, which has the imports done."""
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def test_preparation_from_the_command_line(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(coco)
    for path in list((coco / "panoptic_stuff_train2017").iterdir())[:5]:
        path.unlink()
    assert run_script("datasets/prepare_coco_panoptic.py", "--root", coco, "--workers", 1) == 0
    assert "complete, 5 files written" in capsys.readouterr().out
    assert run_script("datasets/prepare_coco_panoptic.py", "--root", coco / "absent") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No such COCO panoptic file" in line


def test_jobs_run_in_parallel_and_in_order() -> None:
    jobs = [f"folder/{k}" for k in range(100)]
    assert list(run_jobs(os.path.basename, jobs, 2)) == [str(k) for k in range(100)]


@pytest.fixture
def registered(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes.parent))
    register_shapes_panoptic()
    register_coco_panoptic()
    yield
    monkeypatch.undo()
    register_shapes_panoptic()
    register_coco_panoptic()


def training_batch(name: str, count: int) -> list[dict[str, Any]]:
    loader = build_train_loader(
        datasets=name,
        augmentations=[],
        batch_size=count,
        num_workers=0,
        filter_empty=False,
        aspect_ratio_grouping=False,
    )
    return sorted(next(iter(loader)), key=lambda record: record["image_id"])


def test_training_records_are_the_instances_and_the_labels(registered: None, shapes: Path) -> None:
    things = [1, 2, 4, 5, 8, 9]
    content = json.loads((shapes / "annotations/instances_train.json").read_text())
    crowds = sum(a["iscrowd"] for a in content["annotations"])
    assert crowds > 0
    for record in training_batch("shapes_panoptic_train", 60):
        labels = pixels(shapes / f"panoptic_semseg_train/{Path(record['file_name']).stem}.png")
        assert (record["sem_seg"].numpy() == labels).all()
        expected = [
            a
            for a in content["annotations"]
            if a["image_id"] == record["image_id"] and not a["iscrowd"]
        ]
        found = record["instances"]
        assert len(found) == len(expected)
        areas = sorted(
            (c, int(m.sum())) for c, m in zip(found.gt_classes, found.gt_masks.tensor, strict=True)
        )
        assert areas == sorted((things.index(a["category_id"]), a["area"]) for a in expected)
        xywh = found.gt_boxes.tensor.clone()
        xywh[:, 2:] -= xywh[:, :2]
        assert sorted(xywh.tolist()) == sorted(list(map(float, a["bbox"])) for a in expected)


def test_coco_sets_have_detectron2_names(registered: None, coco: Path) -> None:
    prepare(coco)
    metadata = MetadataCatalog.get("coco_2017_val_panoptic_separated")
    assert len(metadata.thing_classes) == 80
    assert len(metadata.stuff_classes) == 54
    assert metadata.stuff_dataset_id_to_contiguous_id[92] == 1  # banner, the first stuff class
    assert len(MetadataCatalog.get("coco_2017_val_panoptic").stuff_classes) == 133
    (record, *_) = DatasetCatalog.get("coco_2017_val_panoptic_stuffonly")
    assert Path(record["sem_seg_file_name"]).parent == coco / "panoptic_stuff_val2017"
    files = PanopticFiles(
        panoptic_json="",
        panoptic_root="",
        images=coco / "val2017",
        instances_json=coco / "annotations/instances_val2017.json",
        sem_seg_root=coco / "panoptic_stuff_val2017",
    )
    MetadataCatalog.get(NAME).set(stuff_classes=["things", "sky", "grass", "brick", "water"])
    try:
        records = panoptic_sets.separated_records(files, NAME)
        assert all(r["annotations"] for r in records)
        stems = [(Path(r["file_name"]).stem, Path(r["sem_seg_file_name"]).stem) for r in records]
        assert all(a == b for a, b in stems)
        (coco / "panoptic_stuff_val2017" / f"{stems[0][0]}.png").unlink()
        with pytest.raises(ValueError, match="1 images have no semantic labels.*prepare_coco_pan"):
            panoptic_sets.separated_records(files, NAME)
    finally:
        MetadataCatalog.remove(NAME)


def test_unified_numbering_of_coco(registered: None, coco: Path, shapes: Path) -> None:
    # The shapes' category ids are not COCO's: their own numbering stands for it.
    file = read_panoptic_json(coco / "annotations/panoptic_val2017.json")
    classes = panoptic_sets.unified_classes(list(file.categories.values()))
    files = PanopticFiles(
        panoptic_json=file.path, panoptic_root=coco / "panoptic_val2017", images=coco / "val2017"
    )
    for record in panoptic_sets.panoptic_records(file, files, classes):
        labels = record["label_rule"].read(record["sem_seg_file_name"])
        ade = pixels(shapes / f"ade/annotations/validation/{Path(record['file_name']).stem}.png")
        assert (labels == np.where(ade == 0, 255, ade - 1)).all()
        names = {classes.stuff_classes[s["category_id"]] for s in record["segments_info"]}
        assert names == {
            file.categories[s["category_id"]]["name"]
            for s in file.annotations[record["image_id"]]["segments_info"]
        }


def test_own_json(shapes: Path, tmp_path: Path) -> None:
    files = PanopticFiles(
        panoptic_json=shapes / "annotations/panoptic_val.json",
        panoptic_root=shapes / "panoptic_val",
        images=shapes / "images/val",
    )
    try:
        classes = register_panoptic_json(NAME, files)
        assert classes.thing_classes == ["circle", "square", "triangle", "star", "ring", "cross"]
        assert classes.stuff_classes == ["things", "sky", "grass", "brick", "water"]
        loader = build_test_loader(
            dataset=NAME, augmentations=evaluation_resize(short_side=80), num_workers=0
        )
        assert [batch[0]["height"] for batch in loader] == [80] * 3
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    content = json.loads(files.panoptic_json.read_text())
    stuff_ids = {c["id"] for c in content["categories"] if not c["isthing"]}
    things, stuff = (
        [
            {
                **annotation,
                "segments_info": [
                    segment
                    for segment in annotation["segments_info"]
                    if (segment["category_id"] in stuff_ids) == kind
                ],
            }
            for annotation in content["annotations"]
        ]
        for kind in (False, True)
    )
    for change, message in (
        ({"categories": content["categories"][:6], "annotations": things}, "no stuff categories"),
        ({"categories": content["categories"][6:], "annotations": stuff}, "no thing categories"),
        (
            {"categories": content["categories"][1:]},
            r"segments with an unknown category: .*category 1[;.]",
        ),
    ):
        path = tmp_path / "broken.json"
        path.write_text(json.dumps(content | change))
        broken = PanopticFiles(
            panoptic_json=path, panoptic_root=files.panoptic_root, images=files.images
        )
        with pytest.raises(ValueError, match=message):
            register_panoptic_json(NAME, broken)
    for key in ("panoptic_root", "images"):
        fields = {**vars(files), key: tmp_path / "absent"}
        with pytest.raises(ValueError, match="folder .*absent does not exist"):
            register_panoptic_json(NAME, PanopticFiles(**fields))


@pytest.fixture
def ade(shapes: Path, tmp_path: Path) -> Path:
    """The shapes in ADE20K's layout: shape k is instance class 10 k, stuff k scene class k."""
    for split, folder in (("train", "training"), ("val", "validation")):
        for kind in ("annotations", "annotations_instance"):
            (tmp_path / kind / folder).mkdir(parents=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / folder).symlink_to(shapes / "images" / split)
        file = json.loads((shapes / f"annotations/panoptic_{split}.json").read_text())
        order = [c["id"] for c in file["categories"]]
        for annotation in file["annotations"]:
            ids = read_segment_ids(shapes / f"panoptic_{split}" / annotation["file_name"])
            scene = np.zeros(ids.shape, dtype=np.uint8)
            objects = np.zeros((*ids.shape, 3), dtype=np.uint8)
            for number, segment in enumerate(annotation["segments_info"], start=1):
                where, k = ids == segment["id"], order.index(segment["category_id"])
                scene[where] = THING_NUMBERS[10 * k + 9] if k < 6 else k - 5
                if k < 6:
                    objects[where] = (10 * k + 10, number, 0)
            Image.fromarray(scene).save(tmp_path / "annotations" / folder / annotation["file_name"])
            path = tmp_path / "annotations_instance" / folder / annotation["file_name"]
            Image.fromarray(objects).save(path)
    return tmp_path


def as_set(root: Path, name: str) -> set[tuple[int, ...]]:
    """(image id, category, area, box) of every segment or instance of a file."""
    content = json.loads((root / name).read_text())
    rows = [(a["image_id"], s) for a in content["annotations"] for s in a.get("segments_info", [a])]
    return {(image_id, s["category_id"], s["area"], *s["bbox"]) for image_id, s in rows}


def expected_set(shapes: Path, name: str) -> set[tuple[int, ...]]:
    ids = [1, 2, 4, 5, 8, 9, 21, 22, 25, 28]
    numbers = [THING_NUMBERS[10 * k + 9] - 1 for k in range(6)] + [0, 1, 2, 3]
    found = as_set(shapes, f"annotations/{name}")
    return {(image_id, numbers[ids.index(c)], *rest) for image_id, c, *rest in found}


def test_ade20k_objects_are_those_of_the_pictures(ade: Path, shapes: Path) -> None:
    written = prepare_ade20k_instances(ade, workers=1, partial=True)
    assert [p.name for p in written] == ["ade20k_instance_train.json", "ade20k_instance_val.json"]
    assert prepare_ade20k_instances(ade, workers=1, partial=True) == []
    prepare_ade20k_panoptic(ade, workers=1, partial=True)
    for split in ("train", "val"):
        for kind, name in (("instance", "instances"), ("panoptic", "panoptic")):
            found = as_set(ade, f"ade20k_{kind}_{split}.json")
            assert found == expected_set(shapes, f"{name}_{split}.json")
        content = json.loads((ade / f"ade20k_instance_{split}.json").read_text())
        assert len(content["categories"]) == 100
        for annotation in content["annotations"]:
            assert mask_utils.area(annotation["segmentation"]) == annotation["area"]
        findings = verify_panoptic(
            ade / f"ade20k_panoptic_{split}.json",
            ade / f"ade20k_panoptic_{split}",
            ade / "images" / {"train": "training", "val": "validation"}[split],
        )
        assert [f.problem for f in findings] == ["classes without segments"]


def test_ade20k_classes_are_the_published_ones() -> None:
    # Counts and the first and last things of the published table.
    assert len(THING_NUMBERS) == len(set(THING_NUMBERS)) == 100
    assert (THING_NUMBERS[:3], THING_NUMBERS[-1]) == ((8, 9, 11), 150)
    by_name = {c["name"]: c["isthing"] for c in panoptic_sets.panoptic_categories()}
    expected = {"wall": 0, "sky": 0, "bed": 1, "person": 1, "window": 1, "water": 0, "flag": 1}
    assert {name: by_name[name] for name in expected} == expected
    assert len(by_name) == 150


def test_ade20k_preparation_continues(ade: Path) -> None:
    prepare_ade20k_panoptic(ade, workers=1, partial=True)
    first = (ade / "ade20k_panoptic_val.json").read_text()
    pngs = sorted((ade / "ade20k_panoptic_val").iterdir())
    before, time = pngs[0].read_bytes(), pngs[1].stat().st_mtime_ns
    pngs[0].unlink()
    (ade / "ade20k_panoptic_val.json").unlink()
    prepare_ade20k_panoptic(ade, workers=1, partial=True)
    assert (ade / "ade20k_panoptic_val.json").read_text() == first
    assert (pngs[0].read_bytes(), pngs[1].stat().st_mtime_ns) == (before, time)


def test_ade20k_files_that_are_not_as_published(ade: Path) -> None:
    with pytest.raises(ValueError, match="60 images with annotations_instance.*20210.*--partial"):
        prepare_ade20k_instances(ade, workers=1)
    path = next((ade / "annotations_instance/training").iterdir())
    original = np.array(Image.open(path))
    for (r, g), message in (((101, 9), "instance 9 has class 101"), ((0, 8), "has class 0")):
        changed = original.copy()
        changed[:2] = (r, g, 0)
        changed[changed[..., 1] == g] = (r, g, 0)
        Image.fromarray(changed).save(path)
        with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
            prepare_ade20k_instances(ade, workers=1, partial=True)
    Image.fromarray(original[:5]).save(path)
    with pytest.raises(ValueError, match=f"{path.name} is 5 x 96"):
        prepare_ade20k_panoptic(ade, workers=1, partial=True)


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the validation set, to break."""
    for folder in ("panoptic_val", "images"):
        (tmp_path / folder).mkdir()
    for path in (shapes / "images/val").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    for path in (shapes / "panoptic_val").iterdir():
        (tmp_path / "panoptic_val" / path.name).write_bytes(path.read_bytes())
    text = (shapes / "annotations/panoptic_val.json").read_text()
    content = json.loads(text)
    used = {s["category_id"] for a in content["annotations"] for s in a["segments_info"]}
    content["categories"] = [c for c in content["categories"] if c["id"] in used]
    (tmp_path / "panoptic_val.json").write_text(json.dumps(content))
    return tmp_path


def problems(own: Path) -> dict[str, Any]:
    findings = verify_panoptic(own / "panoptic_val.json", own / "panoptic_val", own / "images")
    return {finding.problem: finding for finding in findings}


def first_segments(content: dict) -> list[dict]:
    return content["annotations"][0]["segments_info"]


BREAK_JSON = {
    "duplicate segment ids": lambda c: first_segments(c).append(first_segments(c)[0]),
    "segments without pixels": lambda c: first_segments(c).append(
        {**first_segments(c)[0], "id": 77}
    ),
    "segments with id 0": lambda c: first_segments(c).append({**first_segments(c)[0], "id": 0}),
    "segments with an unknown category": lambda c: first_segments(c)[0].update(category_id=1000),
    "pixels of an unlisted segment": lambda c: first_segments(c).pop(0),
    "areas that disagree with the PNG": lambda c: first_segments(c)[0].update(area=5),
    "boxes that disagree with the PNG": lambda c: first_segments(c)[0].update(bbox=[0, 0, 1, 1]),
    "categories that are both thing and stuff": lambda c: c["categories"].append(
        {**c["categories"][0], "isthing": 1 - c["categories"][0]["isthing"]}
    ),
    "duplicate categories": lambda c: c["categories"].append(c["categories"][0]),
    "images without annotation": lambda c: c["images"].append({"id": 1, "file_name": "1.jpg"}),
    "images annotated twice": lambda c: c["annotations"].append(c["annotations"][0]),
    "annotations of an unlisted image": lambda c: c["images"].pop(0),
    "missing images": lambda c: c["images"][0].update(file_name="absent.jpg"),
    "missing PNGs": lambda c: c["annotations"][0].update(file_name="absent.png"),
    "classes without segments": lambda c: c["categories"].append(
        {"id": 99, "name": "rare", "isthing": 1}
    ),
    "missing things or stuff": lambda c: [c.update(isthing=1) for c in c["categories"]],
}
NOT_FATAL = {
    "areas that disagree with the PNG",
    "boxes that disagree with the PNG",
    "images without annotation",
    "classes without segments",
}


@pytest.mark.parametrize("problem", BREAK_JSON)
def test_verification_finds(problem: str, own: Path) -> None:
    assert problems(own) == {}
    path = own / "panoptic_val.json"
    content = json.loads(path.read_text())
    BREAK_JSON[problem](content)
    path.write_text(json.dumps(content))
    found = problems(own)
    assert problem in found
    assert found[problem].fatal == (problem not in NOT_FATAL)
    # A category that is listed twice repeats its id and its name.
    assert len(found[problem].examples) == (2 if "categories" in problem else 1)


def test_verification_finds_broken_files(own: Path) -> None:
    first, second, third = sorted((own / "panoptic_val").iterdir())
    Image.fromarray(np.array(Image.open(first))[:40]).save(first)
    Image.open(second).convert("L").save(second)
    third.write_bytes(b"no picture")
    sorted((own / "images").iterdir())[2].write_bytes(b"nor this")
    found = problems(own)
    assert len(found["PNGs whose size differs from the image"].examples) == 1
    assert len(found["unreadable PNGs"].examples) == 2
    assert len(found["unreadable images"].examples) == 1


def test_verification_from_the_command_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--panoptic-json", own / "panoptic_val.json", "--images", own / "images")
    assert run_script("tools/verify_dataset.py", *arguments) == 0
    assert capsys.readouterr().out == "No problems found.\n"
    content = json.loads((own / "panoptic_val.json").read_text())
    first_segments(content)[0]["category_id"] = 1000
    (own / "panoptic_val.json").write_text(json.dumps(content))
    assert run_script("tools/verify_dataset.py", *arguments) == 1
    assert "ERROR: segments with an unknown category (1)" in capsys.readouterr().out
    assert run_script("tools/verify_dataset.py", *arguments[:2]) == 2
    assert "label folders (--sem-images" in capsys.readouterr().err


def test_real_panoptic_data_has_no_fatal_problem(shared_data: Path) -> None:
    root = shared_data / "coco_panoptic"
    for split in ("train2017", "val2017"):
        findings = verify_panoptic(
            root / f"annotations/panoptic_{split}.json",
            root / f"panoptic_{split}",
            root / "images" / split,
        )
        assert not [f for f in findings if f.fatal]
