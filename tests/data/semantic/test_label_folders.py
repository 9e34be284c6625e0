"""Every fault of label folders is one clear error before the first step, or a counted policy."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.data import issue_policies
from focalnet_det.data.semantic.label_folders import (
    ClassList,
    read_class_list,
    register_label_folders,
)
from tests.helpers import bad_files
from tests.helpers.bad_files import HEIGHT, WIDTH

NAME = "test_bad_labels"

pytestmark = pytest.mark.usefixtures("forget_data_sets")
FROM_0 = ClassList(names=("road", "sky", "car"))
FROM_1 = ClassList(names=("road", "sky", "car"), first_label=1)


def write_labels(folder: Path, *values: int, dtype: type = np.uint8, suffix: str = "png") -> Path:
    """Stripes of the values in three files."""
    folder.mkdir(exist_ok=True)
    stripes = np.resize(np.array(values, dtype=dtype), WIDTH)
    for k in range(3):
        pixels = np.tile(stripes, (HEIGHT, 1))
        Image.fromarray(pixels).save(folder / f"{k}.{suffix}")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    labels = write_labels(tmp_path / "labels", 0, 1, 2, 255)
    return bad_files.write_images(tmp_path / "images"), labels


def values(*wanted: int, **options: object) -> Callable[[Path, Path], None]:
    """Writes label files of other values."""

    def change(images: Path, labels: Path) -> None:
        for path in labels.iterdir():
            path.unlink()
        write_labels(labels, *wanted, **options)  # type: ignore[arg-type]

    return change


SIGNED = {"dtype": np.int32, "suffix": "tif"}
ERRORS: dict[str, tuple[Callable[[Path, Path], object], ClassList, str]] = {
    "from 1": (values(1, 2, 3), FROM_0, r"shifted by one: .*contains 3.*--first-label 1"),
    "from 1 with none": (values(0, 1, 2, 3), FROM_0, r"shifted by one.*--first-label 1"),
    "beyond": (values(0, 1, 7), FROM_0, r"unknown .*0\.png contains 7, classes are 0 to 2"),
    "beyond 1": (values(0, 1, 4), FROM_1, "contains 4, classes are 1 to 3"),
    "negative": (values(0, 1, -5, **SIGNED), FROM_0, "contains -5"),
    "above 255": (values(0, 1, 300, **SIGNED), FROM_0, "contains 300"),
    "16 bits": (values(0, 256, dtype=np.uint16), FROM_0, "contains 256"),
    "0 and 255": (values(0, 255), FROM_0, r"pixels of a single class: values \[0, 255\]"),
    "one class": (values(1), FROM_0, "pixels of a single class"),
    "ignored": (values(255), FROM_0, "without pixels of any class"),
    "ignored from 1": (values(0), FROM_1, "without pixels of any class"),
    "grays": (values(*range(0, 250, 10)), FROM_0, "24 x unknown label values"),
    "no partner": (lambda i, _: [p.rename(i / f"x{p.name}") for p in list(i.iterdir())], FROM_0,
                   "No image in"),
    "text": (lambda _, x: [p.write_text("x") for p in x.iterdir()], FROM_0, "3 x unreadable label"),
    "colors": (lambda _, x: bad_files.write_images(x), FROM_0, "3 x unreadable label.*color"),
    "another size": (
        lambda _, x: [Image.open(p).crop((0, 0, 9, 9)).save(p) for p in x.iterdir()],
        FROM_0,
        "3 x label size differs from image: .*is 9 x 9",
    ),
    "no images": (lambda i, _: [p.write_text("x") for p in i.iterdir()], FROM_0,
                  "3 x files that cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", sorted(ERRORS))
def test_errors(case: str, evaluation: bool, folders: tuple[Path, Path]) -> None:
    change, classes, message = ERRORS[case]
    change(*folders)
    with pytest.raises(ValueError, match="labels") as raised:
        register_label_folders(NAME, *folders, classes, evaluation=evaluation)
    assert re.search(message, str(raised.value)), str(raised.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _, x: (x / "0.png").write_text("x"), issue_policies.UNREADABLE_LABELS),
        (
            lambda _, x: Image.open(x / "0.png").crop((0, 0, 9, 9)).save(x / "0.png"),
            issue_policies.LABEL_SIZE_DIFFERS,
        ),
    ],
)
def test_one_file_of_three(
    change: Callable[[Path, Path], object],
    problem: str,
    folders: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A training draws another image, an evaluation stops."""
    change(*folders)
    assert register_label_folders(NAME, *folders, FROM_0) == 3
    assert f"1 x {problem} (skipped)" in caplog.text
    with pytest.raises(ValueError, match=rf"1 x {problem}: .*0\.png"):
        register_label_folders(NAME, *folders, FROM_0, evaluation=True)


def test_sound_folders(folders: tuple[Path, Path]) -> None:
    assert register_label_folders(NAME, *folders, FROM_0, evaluation=True) == 3
    with pytest.raises(FileNotFoundError):
        register_label_folders(NAME, folders[0], folders[1] / "absent", FROM_0)


def test_class_lists_have_fewer_names_than_a_label_has_values(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(map(str, range(256))))
    with pytest.raises(ValueError, match=r"classes\.txt lists 256 classes"):
        read_class_list(path)
    path.write_text("\n".join(map(str, range(255))))
    assert len(read_class_list(path).names) == 255
    with pytest.raises(ValueError, match=r"classes\.txt lists 255 classes"):
        read_class_list(path, 1)
