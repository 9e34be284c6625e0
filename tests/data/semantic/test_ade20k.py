"""ADE20K's labels as Detectron2 reads them."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog

from focalnet_det.data.io.labels import read_labels
from focalnet_det.data.semantic.ade20k import prepare_ade20k_sem_seg
from focalnet_det.data.semantic.label_folders import read_class_list, register_ade20k_sem_seg
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_program

SCRIPT = ROOT / "datasets/prepare_ade20k_sem_seg.py"


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images in the published layout."""
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write(root / f"images/{split}/a.jpg", np.zeros((2, 3, 3), dtype=np.uint8))
        labels = np.array([[0, 1, 150], [2, 3, 4]], dtype=np.uint8)
        write(root / f"annotations/{split}/a.png", labels)
    return root


def test_labels_are_shifted(root: Path) -> None:
    assert prepare_ade20k_sem_seg(root, workers=2, partial=True) == 2
    for split in ("training", "validation"):
        found = np.asarray(Image.open(root / f"annotations_detectron2/{split}/a.png"))
        np.testing.assert_array_equal(found, [[255, 0, 149], [1, 2, 3]])
        assert found.dtype == np.uint8


def test_a_second_run_writes_what_is_missing(root: Path) -> None:
    prepare_ade20k_sem_seg(root, workers=1, partial=True)
    kept = root / "annotations_detectron2/training/a.png"
    time = kept.stat().st_mtime_ns
    (root / "annotations_detectron2/validation/a.png").unlink()
    assert prepare_ade20k_sem_seg(root, workers=1, partial=True) == 1
    assert kept.stat().st_mtime_ns == time
    assert prepare_ade20k_sem_seg(root, workers=1, partial=True) == 0
    assert not list(root.rglob("*.tmp"))


def test_what_is_not_as_published_is_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match="1 images with labels in training.*20210"):
        prepare_ade20k_sem_seg(root, workers=1)
    write(root / "annotations/validation/a.png", np.full((2, 3), 151, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png contains 151.*1 to 150"):
        prepare_ade20k_sem_seg(root, workers=1, partial=True)
    write(root / "annotations/validation/a.png", np.zeros((3, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png is 3 x 2 .*2 x 3"):
        prepare_ade20k_sem_seg(root, workers=1, partial=True)


def test_script(root: Path, tmp_path: Path) -> None:
    def call(*options: str) -> subprocess.CompletedProcess:
        return run_program(SCRIPT, "--workers", "1", *options)

    done = call("--root", str(root), "--partial")
    assert done.returncode == 0, done.stderr
    assert "complete, 2 files written" in done.stdout
    failed = call("--root", str(tmp_path / "absent"))
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "No such folder" in failed.stderr


def test_real_labels(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shared_data / "ade20k_mini"
    root = tmp_path / "ADEChallengeData2016"
    root.mkdir()
    for name in ("images", "annotations"):
        (root / name).symlink_to(source / name)
    assert prepare_ade20k_sem_seg(root, workers=1, partial=True) == 4
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_ade20k_sem_seg()
    classes = read_class_list(source / "objectInfo150.txt")
    assert (len(classes.names), classes.first_label, classes.names[0]) == (150, 1, "wall")
    for record in DatasetCatalog.get("ade20k_sem_seg_val"):
        prepared = read_labels(record["sem_seg_file_name"], record["label_rule"])
        raw = source / "annotations/validation" / Path(record["sem_seg_file_name"]).name
        np.testing.assert_array_equal(prepared, read_labels(raw, classes.rule))
