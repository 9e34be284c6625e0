"""Folders and archives of images hold the same classes and pixels, and damaged ones are named."""

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.data.classification.image_folders import (
    class_records,
    register_class_folders,
    unlabeled_records,
)
from focalnet_det.data.io.issues import DataError
from focalnet_det.data.io.read_image import UnreadableImageError, read_image
from focalnet_det.data.issue_policies import EMPTY_CLASS


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes ant (2 images, one of them in a subfolder), bee (1) and cat (none)."""
    root = tmp_path / "images"
    for seed, name in enumerate(["ant/0.png", "ant/more/1.jpg", "bee/0.png"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    (root / "cat").mkdir()
    (root / "ant/notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    picture(9).save(root / ".cache/x.png")
    return root


def zipped(folder: Path, path: Path, compression: int, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, path: Path, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname="train")
    return path


def tar_of_tars(folder: Path, path: Path) -> Path:
    """As ImageNet's archive of training images: a tar per class, in a tar."""
    with tarfile.open(path, "w") as outer:
        for cls in ("ant", "bee"):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for file in sorted((folder / cls).rglob("*.*")):
                    inner.add(file, arcname=file.name)
            row = tarfile.TarInfo(f"{cls}.tar")
            row.size = len(content.getvalue())
            outer.addfile(row, io.BytesIO(content.getvalue()))
    return path


ARCHIVES = {
    "stored.zip": lambda f, p: zipped(f, p, zipfile.ZIP_STORED),
    "deflated.zip": lambda f, p: zipped(f, p, zipfile.ZIP_DEFLATED, "some/train/"),
    "plain.tar": tarred,
    "nested.tar": tar_of_tars,
}


def contents(source: Path, classes: list[str] | None = None) -> list[tuple[str, bytes]]:
    names, records, _ = class_records(source, classes)
    rows = [(names[r["label"]], read_image(r["file_name"], "RGB").tobytes()) for r in records]
    return sorted(rows)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_hold_what_the_folder_holds(name: str, folder: Path, tmp_path: Path) -> None:
    archive = ARCHIVES[name](folder, tmp_path / name)
    expected = contents(folder)
    assert [cls for cls, _ in expected] == ["ant", "ant", "bee"]
    assert expected[2][1] == np.asarray(picture(2)).tobytes()
    assert contents(archive) == expected
    assert len(unlabeled_records(archive)) == 3


def test_labels_follow_the_list_of_classes(folder: Path) -> None:
    names, records, issues = class_records(folder)
    assert names == ("ant", "bee", "cat")
    assert [r["label"] for r in records] == [0, 0, 1]
    assert issues == {EMPTY_CLASS: 1}
    names, records, issues = class_records(folder, ["cat", "dog", "bee", "ant"])
    assert [r["label"] for r in records] == [2, 3, 3]
    assert issues == {EMPTY_CLASS: 2}
    with pytest.raises(ValueError, match="not among the 2 classes: bee"):
        class_records(folder, ["ant", "cat"])


def test_damaged_images_are_counted_in_training_and_refused_in_evaluation(
    folder: Path, caplog: pytest.LogCaptureFixture, forget_data_sets: None
) -> None:
    (folder / "bee/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    register_class_folders("damaged_train", folder)
    assert "1 x unreadable image (skipped)" in caplog.text
    assert "1 x class without images (kept)" in caplog.text
    with pytest.raises(DataError, match=r"1 x files that cannot be read: .*broken\.jpg"):
        register_class_folders("damaged_val", folder, evaluation=True)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda p: p / "nowhere", "No such folder or archive"),
        (lambda p: p, "no images in class folders"),
        (lambda p: picture(0).save(p / "0.png") or p, "outside of a class"),
        (
            lambda p: (p / "x.zip").write_bytes(b"no") and p / "x.zip",
            "cannot be read as an archive",
        ),
        (lambda p: tarred(p, p.parent / "x.tar", "w:gz"), "not compressed"),
    ],
)
def test_folders_that_cannot_be_used_say_why(make: Any, error: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        class_records(make(root))


def test_a_truncated_archive_is_an_unreadable_image(folder: Path, tmp_path: Path) -> None:
    archive = tarred(folder, tmp_path / "x.tar")
    _, records, _ = class_records(archive)
    archive.write_bytes(archive.read_bytes()[:1500])
    with pytest.raises(UnreadableImageError, match="ends within it"):
        read_image(records[-1]["file_name"], "RGB")
