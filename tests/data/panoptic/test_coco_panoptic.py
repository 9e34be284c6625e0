"""Preparation of COCO's panoptic data."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.data.io.write_image import run_jobs
from tests.helpers.panoptic_files import pixels, prepare, run_script


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
