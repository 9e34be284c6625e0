"""Images of every kind, against pixel values worked out by hand."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import detection_utils

from focalnet_det.data.io.read_image import UnreadableImageError, read_image, read_rgb
from focalnet_det.data.issue_policies import (
    DEEPER_THAN_8_BITS,
    EXIF_ROTATED,
    NOT_RGB,
    TRANSPARENT,
)

# 2 rows of 3 pixels, so that height and width cannot be mixed up.
COLOURS = np.array(
    [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(10, 20, 30), (255, 255, 255), (0, 0, 0)]],
    dtype=np.uint8,
)
GREY = np.array([[0, 1, 2], [100, 254, 255]], dtype=np.uint8)
EXIF_ORIENTATION = 274


def saved(image: Image.Image, folder: Path, suffix: str, **options: Any) -> Path:
    path = folder / f"image.{suffix}"
    image.save(path, **options)
    return path


def grey_as_rgb(values: Any) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=np.uint8)[:, :, None], 3, axis=2)


def problems(path: Path) -> list[str]:
    return read_rgb(path)[1]


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    path = saved(Image.fromarray(COLOURS), tmp_path, "png")
    array = read_image(path, "RGB")
    assert array.dtype == np.uint8
    assert (array == COLOURS).all()
    assert (read_image(str(path), "BGR") == COLOURS[:, :, ::-1]).all()
    assert problems(path) == []


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RGB or BGR"):
        read_image(saved(Image.fromarray(COLOURS), tmp_path, "png"), "L")


def test_grey(tmp_path: Path) -> None:
    path = saved(Image.fromarray(GREY), tmp_path, "png")
    assert (read_image(path, "RGB") == grey_as_rgb(GREY)).all()
    assert problems(path) == [NOT_RGB]


def test_black_and_white(tmp_path: Path) -> None:
    bits = np.array([[0, 255, 0], [255, 255, 0]], dtype=np.uint8)
    path = saved(Image.fromarray(bits).convert("1"), tmp_path, "png")
    assert Image.open(path).mode == "1"
    assert (read_image(path, "RGB") == grey_as_rgb(bits)).all()


def test_palette(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8), "P")
    image.putpalette([9, 8, 7, 60, 50, 40, 1, 2, 3])
    path = saved(image, tmp_path, "png")
    table = np.array([(9, 8, 7), (60, 50, 40), (1, 2, 3)])
    assert (read_image(path, "RGB") == table[[[0, 1, 2], [2, 1, 0]]]).all()
    assert problems(path) == [NOT_RGB]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency_lies_on_white(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), "P")
    image.putpalette([9, 8, 7, 60, 50, 40])
    path = saved(image, tmp_path, suffix, transparency=1)
    expected = [[(9, 8, 7), (255, 255, 255)], [(255, 255, 255), (9, 8, 7)]]
    assert (read_image(path, "RGB") == np.array(expected)).all()
    assert problems(path) == [TRANSPARENT]


def test_rgba_lies_on_white(tmp_path: Path) -> None:
    pixels = [[(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)]]
    path = saved(Image.fromarray(np.array(pixels, dtype=np.uint8)), tmp_path, "png")
    # 51 of 255 is a fifth: 0.2 * (200, 100, 0) + 0.8 * 255.
    expected = [[(200, 100, 0), (255, 255, 255), (244, 224, 204)]]
    assert (read_image(path, "RGB") == np.array(expected)).all()
    assert problems(path) == [TRANSPARENT]


def test_alpha_that_hides_nothing_changes_nothing(tmp_path: Path) -> None:
    path = saved(Image.fromarray(COLOURS).convert("RGBA"), tmp_path, "png")
    assert (read_image(path, "RGB") == COLOURS).all()
    assert problems(path) == [NOT_RGB]


def test_grey_with_alpha_lies_on_white(tmp_path: Path) -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 50), Image.new("L", (2, 1), 255)])
    image.putpixel((1, 0), (50, 0))
    path = saved(image, tmp_path, "png")
    assert (read_image(path, "RGB") == np.array([[[50] * 3, [255] * 3]])).all()


@pytest.mark.parametrize(("mode", "clear"), [("L", 100), ("RGB", (0, 255, 0))])
def test_transparent_colour_lies_on_white(tmp_path: Path, mode: str, clear: Any) -> None:
    pixels, rgb = (GREY, grey_as_rgb(GREY)) if mode == "L" else (COLOURS, COLOURS)
    path = saved(Image.fromarray(pixels), tmp_path, "png", transparency=clear)
    expected = np.where((rgb == np.array(clear)).all(2, keepdims=True), 255, rgb)
    assert (expected != rgb).any()
    assert (read_image(path, "RGB") == expected).all()
    assert problems(path) == [TRANSPARENT]


def test_cmyk(tmp_path: Path) -> None:
    pixels = [[(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 102, 0, 0)]]
    path = saved(Image.fromarray(np.array(pixels, dtype=np.uint8), "CMYK"), tmp_path, "tif")
    expected = [[(255, 255, 255), (0, 255, 255), (0, 0, 0), (255, 153, 255)]]
    assert (read_image(path, "RGB") == np.array(expected)).all()
    assert problems(path) == [NOT_RGB]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = saved(Image.new("CMYK", (16, 8), (255, 0, 0, 0)), tmp_path, "jpg", quality=95)
    assert np.abs(read_image(path, "RGB").astype(int) - [0, 255, 255]).max() <= 3


def test_lab(tmp_path: Path) -> None:
    # L 0..255 is 0..100 %; a and b are signed bytes: white, black, middle grey.
    pixels = np.array([[(255, 0, 0), (0, 0, 0), (128, 0, 0)]], dtype=np.uint8)
    path = saved(Image.fromarray(pixels, "LAB"), tmp_path, "tif")
    # CIE L* of 50.2 is a luminance of 0.186, which sRGB writes as 119.
    expected = np.array([[[255] * 3, [0] * 3, [119] * 3]])
    assert np.abs(read_image(path, "RGB").astype(int) - expected).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 65535], [32768, 300, 4095]], dtype=np.uint16)
    path = saved(Image.fromarray(values), tmp_path, suffix)
    assert (read_image(path, "RGB") == grey_as_rgb([[0, 1, 255], [128, 1, 16]])).all()
    assert problems(path) == [DEEPER_THAN_8_BITS]


def test_16_bits_with_the_high_byte_first(tmp_path: Path) -> None:
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 65535, 25700))
    assert (read_image(path, "RGB") == grey_as_rgb([[0, 255, 100]])).all()
    tiff = saved(Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 514, 65535)), tmp_path, "tif")
    assert (read_image(tiff, "RGB") == grey_as_rgb([[2, 255]])).all()


def png_chunk(name: bytes, content: bytes) -> bytes:
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def test_16_bits_in_colour(tmp_path: Path) -> None:
    """Pillow cannot write these: 2 x 1 pixels of 3 x 16 bits, put together by hand."""
    rows = b"\0" + struct.pack(">6H", 0, 65535, 257, 25700, 51400, 5140)
    path = tmp_path / "image.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )
    assert (read_image(path, "RGB") == np.array([[(0, 255, 1), (100, 200, 20)]])).all()


def test_32_bit_integers_are_taken_as_16(tmp_path: Path) -> None:
    values = np.array([[0, 65535], [25700, 257]], dtype=np.int32)
    path = saved(Image.fromarray(values), tmp_path, "tif")
    assert Image.open(path).mode == "I"
    assert (read_image(path, "RGB") == grey_as_rgb([[0, 255], [100, 1]])).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.2, 1.0]], [[0, 51, 255]]),
        ([[0.0, 99.6, 255.0]], [[0, 100, 255]]),
        ([[0.0, 25700.0, 65535.0]], [[0, 100, 255]]),
    ],
)
def test_floats_are_scaled_from_their_range(
    tmp_path: Path, values: list[list[float]], expected: list[list[int]]
) -> None:
    path = saved(Image.fromarray(np.array(values, dtype=np.float32)), tmp_path, "tif")
    assert (read_image(path, "RGB") == grey_as_rgb(expected)).all()
    assert problems(path) == [DEEPER_THAN_8_BITS]


@pytest.mark.parametrize(
    "values", [np.float32([[-0.5, 1]]), np.float32([[np.nan, 1]]), np.int32([[0, 70000]])]
)
def test_values_without_a_range_are_unreadable(tmp_path: Path, values: np.ndarray) -> None:
    path = saved(Image.fromarray(values), tmp_path, "tif")
    with pytest.raises(UnreadableImageError, match=r"image\.tif.*0 to 65535"):
        read_image(path, "RGB")


# What each orientation does to the upright picture, from the EXIF 2.3 table of where row 0 and
# column 0 of the stored picture lie in the upright one.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],  # row 0 is the top, column 0 the right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.transpose(1, 0, 2),  # left, top
    6: lambda upright: upright[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda upright: upright[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("orientation", sorted(STORED))
def test_exif_orientations(tmp_path: Path, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](COLOURS))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = saved(Image.fromarray(stored), tmp_path, "png", exif=exif)
    assert (read_image(path, "RGB") == COLOURS).all()
    assert problems(path) == ([] if orientation == 1 else [EXIF_ROTATED])


def test_rotated_grey_of_16_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 3
    values = np.array([[0, 65535, 257]], dtype=np.uint16)
    path = saved(Image.fromarray(values), tmp_path, "png", exif=exif)
    assert (read_image(path, "RGB") == grey_as_rgb([[1, 255, 0]])).all()
    assert problems(path) == [EXIF_ROTATED, DEEPER_THAN_8_BITS]


def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "gif", "ppm"])
def test_truncated_files_are_unreadable(tmp_path: Path, suffix: str) -> None:
    path = saved(noise(), tmp_path, suffix)
    content = path.read_bytes()
    read_image(path, "RGB")
    for share in (0.05, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UnreadableImageError, match=rf"Cannot read image .*image\.{suffix}: "):
            read_image(path, "RGB")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"<html>404</html>", "format"), (b"\x89PNG\r\n\x1a\n", "")],
)
def test_no_picture(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=rf"image\.png: .*{reason}") as raised:
        read_image(path, "RGB")
    # Loader processes send errors so, and raise them again from their text alone.
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(UnreadableImageError(str(again))) == str(raised.value)


def test_damage_within_the_data(tmp_path: Path) -> None:
    path = saved(noise(), tmp_path, "png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(UnreadableImageError):
        read_image(path, "RGB")


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableImageError, match="exceeds limit"):
        read_image(saved(noise(), tmp_path, "png"), "RGB")


def test_missing_files_and_folders_are_not_unreadable_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist.*image folder"):
        read_image(tmp_path / "none.png", "RGB")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path, "RGB")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_detectron2_reads_the_same_from_jpeg(tmp_path: Path, mode: str) -> None:
    path = saved(noise().convert(mode), tmp_path, "jpg")
    for image_format in ("RGB", "BGR"):
        expected = detection_utils.read_image(str(path), image_format)
        assert (read_image(path, image_format) == expected).all()


def test_real_grey_and_colour_images(shared_data: Path) -> None:
    folder = shared_data / "nuclei" / "images" / "val"
    paths = sorted(folder.glob("*.png"))
    if not paths:
        pytest.skip("missing: ../shared/data/nuclei")
    modes = set()
    for path in paths[::3]:
        image = Image.open(io.BytesIO(path.read_bytes()))
        modes.add(image.mode)
        pixels = np.asarray(image)
        expected = grey_as_rgb(pixels) if image.mode == "L" else pixels
        assert (read_image(path, "RGB") == expected).all()
        assert problems(path) == ([NOT_RGB] if image.mode == "L" else [])
    assert modes == {"L", "RGB"}
