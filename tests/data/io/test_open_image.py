"""Files that are no pictures, or pictures without bounds: one clear error, in no time."""

import io
import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import transforms as T

from focalnet_det.data import issue_policies
from focalnet_det.data.augmentation import (
    evaluation_resize,
    large_scale_jitter,
    multiscale_or_crop,
    resize,
    resize_and_crop,
)
from focalnet_det.data.io import open_image as pictures
from focalnet_det.data.io.labels import UnreadableLabelsError, read_values
from focalnet_det.data.io.open_image import upright_size
from focalnet_det.data.io.read_image import UnreadableImageError, read_rgb
from focalnet_det.data.panoptic.segments import read_segment_ids
from focalnet_det.data.registry import register_coco_json
from focalnet_det.data.semantic.semantic_crops import semantic_crops
from tests.helpers import bad_files
from tests.helpers.paths import ROOT

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
(ran) print
showpage
"""


def png(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def huge(path: Path) -> None:
    """Black on a few kB."""
    Image.new("1", (13_000, 13_000)).save(path, "png")


# Case: how the file is made, and what the message says.
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (write(b""), "the file is empty"),
    "text": (write(b"hello"), "unsupported image format"),
    "html": (write(b"<!doctype html><title>404</title>"), "unsupported image format"),
    "lfs pointer": (write(b"version https://git-lfs.github.com/spec/v1\n"), "unsupported"),
    "zip": (write(b"PK\x03\x04" + bytes(60)), "unsupported image format"),
    "eps": (write(EPS), "unsupported image format"),
    "wmf": (write(b"\xd7\xcd\xc6\x9a" + bytes(80)), "unsupported image format"),
    "fits": (write(b"SIMPLE  =                    T" + bytes(4000)), "unsupported"),
    "signature alone": (write(b"\x89PNG\r\n\x1a\n"), ""),
    "header alone": (write(png(8, 8)[:33]), ""),
    "no pixels": (write(png(8, 8)), ""),
    "no size": (write(png(0, 8)), ""),
    "100,000 a side": (write(png(100_000, 100_000)), "exceed"),
    "2**31 a side": (write(png(2**31 - 1, 2**31 - 1)), ""),
    "13,000 a side": (
        huge,
        "13000 x 13000 pixels exceed the limit .*cut image and annotations into tiles",
    ),
    "pipe": (os.mkfifo, "is a device or a pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device or a pipe"),
    "random device": (lambda path: path.symlink_to("/dev/urandom"), "is a device or a pipe"),
    "half a jpeg": (
        lambda path: write(jpeg()[: len(jpeg()) // 2])(path),
        "",
    ),
}


def jpeg() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.mark.parametrize("case", sorted(BAD))
def test_files_that_are_no_pictures(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    path = tmp_path / "bad.jpg"
    make(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImageError, match=rf"Cannot read image .*bad\.jpg: .*{message}"):
        read_rgb(path)
    for read in (read_values, read_segment_ids):
        with pytest.raises(UnreadableLabelsError, match=r"bad\.jpg"):
            read(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**19  # kB


def test_files_of_more_bytes_than_any_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    path = tmp_path / "bad.jpg"
    path.write_bytes(bytes(101))
    with pytest.raises(UnreadableImageError, match="more than 100 bytes"):
        read_rgb(path)


def test_ghostscript_is_never_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def called(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", called)
    path = tmp_path / "a.jpg"
    path.write_bytes(EPS)
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(UnreadableImageError, match="unsupported"):
        read_rgb(path)


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_files_of_several_pictures_are_counted(suffix: str, tmp_path: Path) -> None:
    colors = ["red", "lime", "blue"]
    pages = [Image.new("RGB", (8, 6), color) for color in colors]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    picture, problems = read_rgb(path)
    assert issue_policies.MULTIPLE_FRAMES in problems
    assert picture.getpixel((0, 0)) == (255, 0, 0)
    pages[0].save(path)
    assert issue_policies.MULTIPLE_FRAMES not in read_rgb(path)[1]


def test_a_header_tells_the_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == (20, 10)
    picture, _ = read_rgb(tmp_path / "a.jpg")
    assert (picture.height, picture.width) == (20, 10)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (1, 1)])
def test_images_of_any_shape_can_be_augmented(shape: tuple[int, int]) -> None:
    policies = [
        resize(),
        resize(antialias=False),
        multiscale_or_crop(),
        resize_and_crop(short_sides=(300,), crop=256),
        large_scale_jitter(size=256),
        evaluation_resize(),
    ]
    for seed, policy in enumerate(policies * 2):
        np.random.seed(seed)
        found = T.AugInput(np.full((*shape, 3), 200, dtype=np.uint8))
        T.AugmentationList(policy)(found)
        assert min(found.image.shape[:2]) >= 1
        assert max(found.image.shape[:2]) <= 1333
        # One color stays itself however it is resized; 128 fills what is padded.
        assert {200} <= set(np.unique(found.image)) <= {128, 200}
    labels = np.full(shape, 3, dtype=np.uint8)
    for policy in (semantic_crops(), semantic_crops(photometric=False)):
        found = T.AugInput(np.full((*shape, 3), 200, dtype=np.uint8), sem_seg=labels)
        T.AugmentationList(policy)(found)
        assert found.image.shape[:2] == found.sem_seg.shape
        assert max(found.image.shape[:2]) <= 512
    np.testing.assert_array_equal(found.sem_seg, np.where(found.image[..., 0] == 200, 3, 255))
    assert (found.sem_seg == 3).any()


@pytest.mark.parametrize("broken", [1, 3])
def test_a_sample_of_the_images_is_opened(
    broken: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training can do without one of three images, not without all; an evaluation needs all."""
    images = bad_files.write_images(tmp_path / "images")
    path = bad_files.write_json(tmp_path / "a.json", bad_files.coco())
    for number in range(broken):
        (images / f"{number}.png").write_bytes(b"x")
    if broken == 1:
        register_coco_json("test_bad_images", path, images)
        assert "1 x unreadable image (skipped)" in caplog.text
    else:
        with pytest.raises(ValueError, match="3 x files that cannot be read"):
            register_coco_json("test_bad_images", path, images)
    with pytest.raises(ValueError, match=rf"{broken} x files that cannot be read: .*0\.png"):
        register_coco_json("test_bad_images", path, images, evaluation=True)


def test_nothing_else_opens_pictures() -> None:
    """Every other way would know formats that run programs."""
    openers = [
        str(path.relative_to(ROOT))
        for folder in ("focalnet_det", "tools", "datasets")
        for path in (ROOT / folder).rglob("*.py")
        if any(call in path.read_text() for call in ("Image.open(", "imread(", "utils.read_image("))
    ]
    assert openers == ["focalnet_det/data/io/open_image.py"]
