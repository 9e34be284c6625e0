"""Registered sets that configs name are checked before the first step."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import MetadataCatalog

from focalnet_det.data.check_dataset import check_dataset
from focalnet_det.data.panoptic.panoptic_sets import (
    PanopticFiles,
    register_panoptic,
    separated_classes,
)
from focalnet_det.data.registry import COCO_SETS, register_coco, register_coco_lazily
from focalnet_det.data.semantic.label_folders import ClassList, register_sem_seg
from tests.helpers import bad_files

NAME = "test_check"

pytestmark = pytest.mark.usefixtures("forget_data_sets")


def test_coco(tmp_path: Path) -> None:
    images = bad_files.write_images(tmp_path / "images")
    register_coco_lazily(NAME, tmp_path / "a.json", images, {"thing_colors": [[1, 2, 3]] * 2})
    with pytest.raises(FileNotFoundError, match=f"Dataset {NAME}: .*a.json does not exist"):
        check_dataset(NAME, evaluation=True)
    bad_files.write_json(tmp_path / "a.json", bad_files.coco())
    assert check_dataset(NAME, evaluation=True) == 3
    assert MetadataCatalog.get(NAME).thing_classes == ["a", "b"]
    assert MetadataCatalog.get(NAME).thing_colors == [[1, 2, 3]] * 2
    (images / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 x missing files: .*1\.png"):
        check_dataset(NAME, evaluation=False)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    images = bad_files.write_images(tmp_path / "images")
    content = bad_files.coco()
    register_coco_lazily(NAME, bad_files.write_json(tmp_path / "a.json", content), images)
    check_dataset(NAME, evaluation=False)
    content["categories"][1]["name"] = "c"
    bad_files.write_json(tmp_path / "a.json", content)
    check_dataset(NAME, evaluation=False)
    assert MetadataCatalog.get(NAME).thing_classes == ["a", "c"]


def test_panoptic(tmp_path: Path) -> None:
    content = bad_files.panoptic()
    files = PanopticFiles(
        panoptic_json=bad_files.write_json(tmp_path / "a.json", content),
        panoptic_root=bad_files.write_pngs(tmp_path / "pngs"),
        images=bad_files.write_images(tmp_path / "images", 2),
    )
    register_panoptic(NAME, files, separated_classes(content["categories"]))
    assert check_dataset(NAME, evaluation=True) == 2
    (tmp_path / "pngs/1.png").unlink()
    with pytest.raises(ValueError, match=r"1 x missing files: .*pngs/1\.png"):
        check_dataset(NAME, evaluation=True)


def test_labels(tmp_path: Path) -> None:
    images, labels = bad_files.write_images(tmp_path / "images"), tmp_path / "labels"
    labels.mkdir()
    for number in range(3):
        values = np.resize(np.array([1, 2], dtype=np.uint8), (bad_files.HEIGHT, bad_files.WIDTH))
        Image.fromarray(values).save(labels / f"{number}.png")
    register_sem_seg(NAME, images, labels, ClassList(names=("a", "b"), first_label=1))
    assert check_dataset(NAME, evaluation=True) == 3
    register_sem_seg(NAME, images, labels, ClassList(names=("a", "b")))
    with pytest.raises(ValueError, match="label values shifted by one"):
        check_dataset(NAME, evaluation=False)


def test_cocos_own_names_keep_their_metadata() -> None:
    before = {name: MetadataCatalog.get(name).as_dict() for name in COCO_SETS}
    register_coco()
    for name in COCO_SETS:
        assert MetadataCatalog.get(name).as_dict() == before[name]
        with pytest.raises(FileNotFoundError, match=f"Dataset {name}: .*does not exist"):
            check_dataset(name, evaluation=True)
