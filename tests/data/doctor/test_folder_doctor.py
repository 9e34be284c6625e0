"""Every kind of broken folder is found, with its remedy; sound ones are not blamed."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.data.doctor.findings import report, verify_sem_seg
from focalnet_det.data.semantic.label_folders import ClassList, read_class_list
from tests.helpers.bad_files import run_tool

FROM_0 = ClassList(names=("road", "sky", "car"))
FROM_1 = ClassList(names=("road", "sky", "car"), first_label=1)


def labels(*values: int) -> np.ndarray:
    return np.array([values], dtype=np.uint8)


def write(folder: Path, files: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        Image.fromarray(values).save(folder / name)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    write(tmp_path / "images", {f"{n}.jpg": np.zeros((1, 4, 3), dtype=np.uint8) for n in "ab"})
    write(tmp_path / "labels", {"a.png": labels(0, 1, 2, 255), "b.png": labels(0, 0, 1, 1)})
    return tmp_path / "images", tmp_path / "labels"


def test_sound_folders(folders: tuple[Path, Path]) -> None:
    assert verify_sem_seg(*folders, FROM_0) == []
    assert report([]) == "No problems found."


def set_all(*values: int) -> Callable[[Path, Path], None]:
    return lambda _, folder: write(folder, {n: labels(*values) for n in ("a.png", "b.png")})


@pytest.mark.parametrize(
    ("damage", "classes", "problem", "remedy", "fatal"),
    [
        (lambda i, _: (i / "b.jpg").unlink(), FROM_0, "labels without image", "same name", False),
        (lambda _, x: (x / "b.png").unlink(), FROM_0, "images without labels", "same name", False),
        (
            lambda i, _: (i / "b.jpg").write_bytes(b"x"),
            FROM_0,
            "unreadable images",
            "Copy them again",
            True,
        ),
        (
            lambda _, x: write(x, {"b.png": np.zeros((1, 4, 3), dtype=np.uint8)}),
            FROM_0,
            "unreadable label files",
            "Convert colors to indices",
            True,
        ),
        (
            lambda _, x: write(x, {"b.png": labels(0, 1)}),
            FROM_0,
            "labels whose size differs from the image",
            "nearest-neighbor",
            True,
        ),
        (
            lambda _, x: write(x, {"b.png": labels(255, 255, 255, 255)}),
            FROM_0,
            "labels that are 255 everywhere",
            "Remove them",
            False,
        ),
        (set_all(1, 2, 3, 255), FROM_0, "labels shifted by one", "Use --first-label 1", True),
        (set_all(0, 1, 2, 3), FROM_0, "labels shifted by one", "0 to 3. Use --first-label 1", True),
        (set_all(0, 1, 2, 9), FROM_0, "unknown label values", "Complete the class list", True),
        (set_all(1, 2, 3, 77), FROM_1, "unknown label values", "1 to 3", True),
        (
            set_all(0, 0, 1, 2),
            FROM_1,
            "labels that may be shifted by one",
            "covers 50% .* use --first-label 0",
            False,
        ),
        (set_all(0, 1, 1, 1), FROM_0, "classes without pixels", "Add images", False),
    ],
)
def test_problems(
    damage: Callable,
    classes: ClassList,
    problem: str,
    remedy: str,
    fatal: bool,
    folders: tuple[Path, Path],
) -> None:
    damage(*folders)
    findings = {finding.problem: finding for finding in verify_sem_seg(*folders, classes)}
    assert problem in findings
    assert re.search(remedy, findings[problem].remedy)
    assert findings[problem].fatal == fatal
    assert findings[problem].examples


def test_tool(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("road\nsky\ncar\n")
    options = ["--classes", tmp_path / "classes.txt"]
    options += ["--sem-images", folders[0], "--sem-labels", folders[1]]
    assert run_tool(*options) == 0
    # The images of this test are 1 x 4 pixels; nothing else is odd.
    (line, _) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: images with a side below 16 pixels (2)")
    set_all(1, 2, 3, 3)(*folders)
    assert run_tool(*options) == 1
    found = capsys.readouterr().out
    assert "ERROR: labels shifted by one (1): 3\n  Values range from 1 to 3" in found


def test_real_sets_are_sound(shared_data: Path) -> None:
    root = shared_data / "camvid"
    classes = read_class_list(root / "categories.json")
    folders = root / "images/validation", root / "annotations/validation"
    assert verify_sem_seg(*folders, classes) == []
