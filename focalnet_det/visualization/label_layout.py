"""Write labels beside objects: never over another object or label, and fewer where it is dense."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

# Share of a picture that labels may cover; of the places of a label, the share that objects may.
LABELED_SHARE = 0.05
COVERED_SHARE = 0.02
# An object at least this many times as large as its label may hold it.
ROOMY = 12
PADDING = 2


@dataclass(frozen=True, kw_only=True)
class Label:
    """Text at an object.

    Attributes:
        text: one line.
        mask: bool (H, W), pixels of the object in the picture.
        color: RGB 0..255, of the text's background.
        urgent: place it before others, whatever is covered by labels already.
        inside: of a region such as sky, which may be covered and is labeled in its middle.
    """

    text: str
    mask: NDArray[np.bool_]
    color: Color
    urgent: bool = False
    inside: bool = False


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib ships, at a size in pixels."""
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def font_size(height: int, width: int) -> int:
    """Return the size of labels in a picture, pixels."""
    return int(np.clip(round((height * width) ** 0.5 / 38), 11, 60))


def draw_labels(picture: NDArray[np.uint8], labels: Sequence[Label]) -> NDArray[np.uint8]:
    """Write labels into a picture; those that have no place are left out.

    Args:
        picture: uint8 RGB, (H, W, 3).
        labels: urgent ones are placed first, then those of large objects.
    Returns: uint8 RGB, (H, W, 3).
    """
    drawn = Image.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    typeface = font(font_size(*picture.shape[:2]))
    for label, (left, top, right, bottom) in place_labels(labels, picture.shape[:2]):
        pen.rectangle((left, top, right - 1, bottom - 1), fill=label.color)
        ink = (0, 0, 0) if luminance(label.color) > 140 else (255, 255, 255)
        pen.text((left + PADDING, (top + bottom) / 2), label.text, ink, typeface, anchor="lm")
    return np.asarray(drawn)


def luminance(color: Color) -> float:
    """Return the luminance of an RGB color, 0..255 (ITU-R BT.601)."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def place_labels(
    labels: Sequence[Label], size: tuple[int, int]
) -> Iterator[tuple[Label, Rectangle]]:
    """Yield the labels that have a place, and the place: left, top, right, bottom in pixels.

    Args:
        labels: see :func:`draw_labels`.
        size: height and width of the picture, pixels.
    """
    objects = np.zeros(size, dtype=np.int32)
    for label in labels:
        if not label.inside:
            objects += label.mask
    taken = np.zeros(size, dtype=bool)
    budget = LABELED_SHARE * taken.size
    typeface = font(font_size(*size))
    areas = [int(label.mask.sum()) for label in labels]
    for index in sorted(range(len(labels)), key=lambda i: (not labels[i].urgent, -areas[i])):
        label = labels[index]
        if not areas[index]:
            continue
        ascent, descent = typeface.getmetrics()
        width = round(typeface.getlength(label.text)) + 2 * PADDING
        height = ascent + descent
        if width * height > budget and not label.urgent:
            continue
        for place in _places(label, areas[index], width, height):
            if _is_free(place, label, objects, taken):
                left, top, right, bottom = place
                taken[top:bottom, left:right] = True
                budget -= width * height
                yield label, place
                break


def _is_free(
    place: Rectangle, label: Label, objects: NDArray[np.int32], taken: NDArray[np.bool_]
) -> bool:
    """Tell whether a place lies in the picture and off other labels and other objects.

    ``objects`` is the number of objects at each pixel, (H, W).
    """
    left, top, right, bottom = place
    height, width = taken.shape
    if left < 0 or top < 0 or right > width or bottom > height:
        return False
    if taken[top:bottom, left:right].any():
        return False
    others = objects[top:bottom, left:right]
    if not label.inside:
        others = others - label.mask[top:bottom, left:right]
    return bool((others > 0).mean() <= COVERED_SHARE)


def _places(label: Label, area: int, width: int, height: int) -> Iterator[Rectangle]:
    """Yield places from the best: around the object, then inside it where it is large."""
    rows, columns = np.flatnonzero(label.mask.any(1)), np.flatnonzero(label.mask.any(0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    centers = (left + right - width) // 2, (top + bottom - height) // 2
    corners = [
        *((x, top - height) for x in (left, centers[0], right - width)),
        *((x, bottom) for x in (left, centers[0], right - width)),
        *((right, y) for y in (top, centers[1], bottom - height)),
        *((left - width, y) for y in (top, centers[1], bottom - height)),
    ]
    inner: list[tuple[int, int]] = []
    if area >= ROOMY * width * height:
        x, y = interior_point(label.mask[top:bottom, left:right])
        inner = [(left + x - width // 2, top + y - height // 2)]
    for x, y in inner if label.inside else [*corners, *inner]:
        yield x, y, x + width, y + height


def interior_point(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return x and y of the pixel of a mask, (H, W), that is farthest from its outside."""
    distance = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(x), int(y)
