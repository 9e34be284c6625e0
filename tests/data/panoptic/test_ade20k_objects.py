"""ADE20K's objects as instances and as panoptic segments."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.data.doctor.panoptic_doctor import verify_panoptic
from focalnet_det.data.panoptic import panoptic_sets
from focalnet_det.data.panoptic.ade20k_objects import (
    THING_NUMBERS,
    prepare_ade20k_instances,
    prepare_ade20k_panoptic,
)
from focalnet_det.data.panoptic.segments import read_segment_ids


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
