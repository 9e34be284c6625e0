"""Read images of many formats and modes as upright 8-bit RGB."""

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from ..issue_policies import (
    DEEPER_THAN_8_BITS,
    EXIF_ROTATED,
    MULTIPLE_FRAMES,
    NOT_RGB,
    TRANSPARENT,
)
from .open_image import FORMATS, num_frames, open_image

IMAGE_FORMATS = ("RGB", "BGR")
ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
FULL_RANGE = 65535
# Upper ends of the value ranges that float images use.
FLOAT_RANGES = (1, 255, FULL_RANGE)


class UnreadableImageError(OSError):
    """Signal that an existing file does not contain a complete, supported image."""


def read_image(path: str | Path, image_format: str) -> NDArray[np.uint8]:
    """Read an image file, rotated upright by its EXIF orientation.

    ``ISSUE_POLICIES`` says how each kind of image is converted. For animations and multi-page
    files, the first frame is used.

    Args:
        path: image file.
        image_format: channel order, "RGB" or "BGR".
    Returns: uint8 (H, W, 3).

    Raises:
        UnreadableImageError if the file is empty, truncated or not an image;
        another OSError if it does not exist or cannot be opened;
        ValueError for another ``image_format``.
    """
    image, _ = read_rgb(path)
    return to_array(image, image_format)


def to_array(image: Image.Image, image_format: str) -> NDArray[np.uint8]:
    """Convert an RGB image to uint8 (H, W, 3) with channels in the order "RGB" or "BGR".

    Raises: ValueError for another ``image_format``.
    """
    if image_format not in IMAGE_FORMATS:
        raise ValueError(
            f"Unknown image format {image_format!r}. Use {' or '.join(IMAGE_FORMATS)}."
        )
    array: NDArray[np.uint8] = detection_utils.convert_PIL_to_numpy(image, image_format)
    return array


def read_rgb(path: str | Path) -> tuple[Image.Image, list[str]]:
    """Read an image file as an upright RGB image.

    Returns: the image, and the issues of ``ISSUE_POLICIES`` that were repaired.
    Raises: OSError as ``read_image``.
    """
    try:
        with open_image(path) as image:
            pages = [MULTIPLE_FRAMES] if num_frames(image) > 1 else []
            image.load()
            rgb, problems = to_upright_rgb(image)
            return rgb, pages + problems
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Image {path} does not exist. Check the image folder, and file_name in the "
            "annotation file."
        ) from error
    except (MemoryError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"Cannot read image {path}: unsupported image format (supported: {', '.join(FORMATS)})."
        ) from error
    # Depending on the format, Pillow raises OSError, SyntaxError, ValueError, EOFError,
    # struct.error, IndexError and others on damaged files.
    except Exception as error:
        raise UnreadableImageError(f"Cannot read image {path}: {error}.") from error


def to_upright_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Convert a loaded image of any mode to upright RGB; also return the issues it had.

    Raises: ValueError if its values cannot be converted.
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
        return lab_to_rgb(upright), [*problems, NOT_RGB]
    return upright.convert("RGB"), [*problems, NOT_RGB]


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image with any kind of transparency to RGBA."""
    # Pillow cannot convert premultiplied grayscale directly.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a 16- or 32-bit integer or float grayscale image to 8 bits (mode L).

    Integers are scaled by 255 / 65535, independently of the image, so that a dark image remains
    darker than a bright one. The full range of floats is the smallest of ``FLOAT_RANGES`` that
    contains the largest value.

    Raises: ValueError if a value is outside 0..65535 or NaN.
    """
    values: NDArray[Any] = np.array(image, dtype=np.float32)  # exact up to 24 bits
    smallest, largest = values.min(), values.max()
    if not (smallest >= 0 and largest <= FULL_RANGE):
        raise ValueError(
            f"its values range from {smallest:g} to {largest:g}; only 0 to {FULL_RANGE} can be "
            "scaled to 8 bits"
        )
    full = FULL_RANGE
    if image.mode == "F":
        full = next(candidate for candidate in FLOAT_RANGES if largest <= candidate)
    values *= 255 / full
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))


def lab_to_rgb(image: Image.Image) -> Image.Image:
    """Convert CIE Lab to sRGB, which ``Image.convert`` does not support."""
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
    )
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None only for conversion in place
    return converted
