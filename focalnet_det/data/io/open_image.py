"""The one place that opens pictures: an allow-list of formats, and bounds on what is decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.utils.file_io import PathManager
from PIL import Image

from .json_files import check_regular

# Without those that run other programs (EPS starts Ghostscript, MPEG and others have no decoder)
# or that nobody keeps photographs or labels in.
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "AVIF",
    "TIFF",
    "BMP",
    "DIB",
    "GIF",
    "PPM",
    "JPEG2000",
    "TGA",
    "ICO",
    "PCX",
    "SGI",
)
MOST_BYTES = 2**30
# Decoded, converted and resized, a picture of this size takes about 1 GB.
MOST_PIXELS = 89_478_485
ORIENTATION = 274
# The second picture of an MPO file is a depth map or a preview of the camera.
FORMATS_WITH_PAGES = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture whose format is in ``FORMATS``; it is decoded when it is used.

    Raises:
        FileNotFoundError, or another OSError, if the file cannot be read;
        ValueError if it is empty, no regular file, of another format, or too large.
    """
    check_regular(path, "Image")
    with PathManager.open(str(path), "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if not content:
        raise ValueError("the file is empty")
    if len(content) > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES:,} bytes")
    with Image.open(io.BytesIO(content), formats=list(allowed_formats())) as image:
        most = min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS)
        if image.width * image.height > most:
            raise ValueError(
                f"its {image.width} x {image.height} pixels exceed the limit of {most:,}: cut it "
                "into tiles, with their own annotations"
            )
        yield image


def allowed_formats() -> Iterator[str]:
    """Yield those of ``FORMATS`` that this Pillow has."""
    Image.init()
    return (name for name in FORMATS if name in Image.OPEN)


def number_of_pages(image: Image.Image) -> int:
    """Return how many pictures a file holds: pages of a TIFF, frames of an animation."""
    return int(getattr(image, "n_frames", 1)) if image.format in FORMATS_WITH_PAGES else 1


def upright_size(path: str | Path) -> tuple[int, int]:
    """Return height and width, pixels, after turning by EXIF; reads the header alone.

    Raises: as ``open_picture``, or what Pillow raises on a damaged header.
    """
    with open_header(path) as image:
        turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def open_header(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture for its format, size and EXIF, without reading the pixels."""
    check_regular(path, "Image")
    with (
        PathManager.open(str(path), "rb") as file,
        Image.open(file, formats=list(allowed_formats())) as image,
    ):
        yield image
