"""Images of many formats and modes, as upright 8-bit RGB."""

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from ..issue_policies import (
    DEEPER_THAN_8_BITS,
    EXIF_ROTATED,
    OTHER_COLOURS,
    SEVERAL_PICTURES,
    TRANSPARENT,
)
from .open_image import FORMATS, number_of_pages, open_picture

IMAGE_FORMATS = ("RGB", "BGR")
ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
FULL_RANGE = 65535
# Ranges in which pictures are stored as floats.
FLOAT_RANGES = (1, 255, FULL_RANGE)


class UnreadableImageError(OSError):
    """A file is there and can be opened, but no complete image can be decoded from it."""


def read_image(path: str | Path, image_format: str) -> NDArray[np.uint8]:
    """Read an image file.

    The image is turned upright by its EXIF orientation. ``ISSUE_POLICIES`` says how each kind of
    image is converted. Of an animation or a file of several pages, the first picture.

    Args:
        path: of the file.
        image_format: channel order, "RGB" or "BGR".
    Returns: (H, W, 3), 0..255.

    Raises:
        UnreadableImageError if the file is empty, truncated or not a picture, with path and reason;
        another OSError if it does not exist or may not be read;
        ValueError if the format is another.
    """
    image, _ = read_rgb(path)
    return to_array(image, image_format)


def to_array(image: Image.Image, image_format: str) -> NDArray[np.uint8]:
    """An RGB picture as (H, W, 3) in the channel order "RGB" or "BGR".

    Raises: ValueError if the format is another.
    """
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"Image format {image_format!r}: must be {' or '.join(IMAGE_FORMATS)}.")
    array: NDArray[np.uint8] = detection_utils.convert_PIL_to_numpy(image, image_format)
    return array


def read_rgb(path: str | Path) -> tuple[Image.Image, list[str]]:
    """Reads an image file as an upright RGB picture.

    Returns: the picture, and the problems of ``tally`` that were repaired in it.
    Raises: OSError as ``read_image`` does.
    """
    try:
        with open_picture(path) as image:
            pages = [SEVERAL_PICTURES] if number_of_pages(image) > 1 else []
            image.load()
            picture, problems = repaired(image)
            return picture, pages + problems
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Image {path} does not exist. Check the image folder, and file_name in the "
            "annotation file."
        ) from error
    except (MemoryError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"Cannot read image {path}: unsupported image format ({', '.join(FORMATS)} can be "
            "read)."
        ) from error
    # Pillow's decoders meet damage with OSError, SyntaxError, ValueError, EOFError, struct.error,
    # IndexError and more, depending on the format.
    except Exception as error:
        raise UnreadableImageError(f"Cannot read image {path}: {error}.") from error


def repaired(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A loaded picture of any mode as upright RGB, and the problems of ``tally`` that it had.

    Raises: ValueError if the mode or the values have no RGB equivalent.
    """
    problems = []
    upright: Image.Image = detection_utils._apply_exif_orientation(image)
    if upright is not image:
        problems.append(EXIF_ROTATED)
    if upright.mode in DEEP_MODES:
        return to_8_bits(upright).convert("RGB"), [*problems, DEEPER_THAN_8_BITS]
    if upright.mode in ALPHA_MODES or "transparency" in upright.info:
        rgba = to_rgba(upright)
        if rgba.getchannel("A").getextrema() != (255, 255):
            white = Image.new("RGBA", rgba.size, "white")
            return Image.alpha_composite(white, rgba).convert("RGB"), [*problems, TRANSPARENT]
        upright = rgba
    if upright.mode == "RGB":
        return upright, problems
    if upright.mode == "LAB":
        return lab_to_rgb(upright), [*problems, OTHER_COLOURS]
    return upright.convert("RGB"), [*problems, OTHER_COLOURS]


def to_rgba(image: Image.Image) -> Image.Image:
    """A picture with transparency of any kind as RGBA."""
    # Pillow has no direct way from grey with premultiplied alpha.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floats, as grey of 8 bits (mode L).

    Integers 0..65535 are scaled by 255 / 65535: the rule is the same for every image, so that a
    dark image stays darker than a bright one. Floats have no such full range; theirs is the
    smallest of ``FLOAT_RANGES`` that holds the largest value.

    Raises: ValueError if a value is outside 0..65535 or NaN.
    """
    values: NDArray[Any] = np.array(image, dtype=np.float32)  # exact up to 24 bits
    smallest, largest = values.min(), values.max()
    if not (smallest >= 0 and largest <= FULL_RANGE):
        raise ValueError(
            f"its values are {smallest:g} to {largest:g}; only 0 to {FULL_RANGE} can be scaled to "
            "8 bits"
        )
    full = FULL_RANGE
    if image.mode == "F":
        full = next(candidate for candidate in FLOAT_RANGES if largest <= candidate)
    values *= 255 / full
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """CIE Lab as sRGB; Pillow's plain conversion lacks it."""
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
    )
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None only for conversion in place
    return converted
