"""Registration and loading of panoptic data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from detectron2.data import DatasetCatalog, MetadataCatalog

from focalnet_det.data.augmentation import evaluation_resize
from focalnet_det.data.loader import build_test_loader, build_train_loader
from focalnet_det.data.panoptic import panoptic_sets
from focalnet_det.data.panoptic.panoptic_sets import (
    PanopticFiles,
    register_coco_panoptic,
    register_panoptic_json,
    register_shapes_panoptic,
)
from focalnet_det.data.panoptic.segments import read_panoptic_json
from tests.helpers.panoptic_files import pixels, prepare

NAME = "test_panoptic_data"


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
