"""Open image files safely: an allowlist of formats, and limits on file size and pixels."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.utils.file_io import PathManager
from PIL import Image

from .json_files import check_regular

# Excludes formats that run other programs (EPS starts Ghostscript), have no decoder (MPEG), or are
# not used for photographs or labels.
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
MAX_BYTES = 2**30
# Pillow's default; decoding, converting and resizing such an image takes about 1 GB.
MAX_PIXELS = 89_478_485
ORIENTATION = 274  # EXIF tag
# MPO is absent: its second frame is a depth map or a preview.
MULTI_FRAME_FORMATS = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image of a format in ``FORMATS``; Pillow decodes it on first use.

    Raises:
        FileNotFoundError or another OSError if the file cannot be read;
        ValueError if it is empty, not a regular file, of another format, or too large.
    """
    check_regular(path, "Image")
    with PathManager.open(str(path), "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if not content:
        raise ValueError("the file is empty")
    if len(content) > MAX_BYTES:
        raise ValueError(f"the file has more than {MAX_BYTES:,} bytes")
    with Image.open(io.BytesIO(content), formats=list(allowed_formats())) as image:
        limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
        if image.width * image.height > limit:
            raise ValueError(
                f"its {image.width} x {image.height} pixels exceed the limit of {limit:,}; cut "
                "image and annotations into tiles"
            )
        yield image


def allowed_formats() -> Iterator[str]:
    """Return the formats of ``FORMATS`` that the installed Pillow supports."""
    Image.init()
    return (name for name in FORMATS if name in Image.OPEN)


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of image files that can be read, in lower case, such as ".jpg"."""
    Image.init()
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in FORMATS)


def num_frames(image: Image.Image) -> int:
    """Return the number of pages of a TIFF or frames of an animation; 1 for other formats."""
    return int(getattr(image, "n_frames", 1)) if image.format in MULTI_FRAME_FORMATS else 1


def upright_size(path: str | Path) -> tuple[int, int]:
    """Read height and width, pixels, after EXIF rotation, from the header alone.

    Raises: as ``open_image``, or what Pillow raises on a damaged header.
    """
    with open_header(path) as image:
        is_rotated = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (image.width, image.height) if is_rotated else (image.height, image.width)


@contextmanager
def open_header(path: str | Path) -> Iterator[Image.Image]:
    """Open an image to access its format, size and EXIF, without reading the pixels."""
    check_regular(path, "Image")
    with (
        PathManager.open(str(path), "rb") as file,
        Image.open(file, formats=list(allowed_formats())) as image,
    ):
        yield image
