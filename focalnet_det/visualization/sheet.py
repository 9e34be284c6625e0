"""Arrange pictures, titles and legends on a page without gaps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..atomic import replacing
from .label_layout import Color, font

Picture = NDArray[np.uint8]

# Pixels.
PAGE_WIDTH = 1440
GAP = 8
TITLE = 24
TEXT = 13
SWATCH = 12
# Smaller images are enlarged so that labels are legible.
MIN_HEIGHT = 420
# Rows of a gallery have about this height, and a panel at most this share of the page width.
GALLERY_HEIGHT = 300
TALLEST = 0.75


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures side by side, scaled to one height and together to the page width.

    Attributes:
        panels: titles and pictures, uint8 RGB (H, W, 3).
        legend: names and colors below the row.
    """

    panels: Sequence[tuple[str, Picture]]
    legend: Sequence[tuple[str, Color]] = field(default=())


def panel_width(panels: int) -> int:
    """Return the width of each of several equal panels of a row, pixels."""
    return (PAGE_WIDTH - (panels - 1) * GAP) // panels


def save_page(rows: Sequence[Row], path: Path) -> None:
    """Save rows as a PNG atomically.

    Raises: OSError if the file cannot be written.
    """
    images = [_row(row) for row in rows]
    page = Image.new("RGB", (PAGE_WIDTH, sum(i.height + GAP for i in images) - GAP), "white")
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height + GAP
    with replacing(path, durable=False) as temporary:
        page.save(temporary, format="PNG")


def gallery(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Distribute pictures over rows that fill the page, each picture in its own aspect ratio.

    Args:
        sizes: height and width of each picture, pixels.
    Returns: for each row the widths of its pictures, pixels, in order.
    """
    aspects = np.array([width / height for height, width in sizes])
    count = max(1, min(len(sizes), round(aspects.sum() * GALLERY_HEIGHT / PAGE_WIDTH)))
    # The row of a picture is where its middle lies.
    middles = aspects.cumsum() - aspects / 2
    numbers = np.minimum((middles / aspects.sum() * count).astype(int), count - 1)
    rows = [aspects[numbers == number] for number in range(count)]
    return [[round(aspect * _row_height(row)) for aspect in row] for row in rows if len(row)]


def _row_height(aspects: Sequence[float] | NDArray[np.float64]) -> float:
    inner = PAGE_WIDTH - (len(aspects) - 1) * GAP
    return min(inner / sum(aspects), TALLEST * PAGE_WIDTH)


def _row(row: Row) -> Image.Image:
    aspects = [picture.shape[1] / picture.shape[0] for _, picture in row.panels]
    height = round(_row_height(aspects))
    lines = _legend_lines(row.legend)
    titled = TITLE * any(title for title, _ in row.panels)
    image = Image.new("RGB", (PAGE_WIDTH, titled + height + len(lines) * TITLE), "white")
    pen = ImageDraw.Draw(image)
    left = 0.0
    for (title, picture), aspect in zip(row.panels, aspects, strict=True):
        width = height * aspect
        pen.text((left + 2, titled / 2), _fit(title, width), "black", font(TEXT), anchor="lm")
        # The last picture ends at the edge, whatever was rounded before.
        right = min(round(left + width), PAGE_WIDTH)
        image.paste(resized(picture, (right - round(left), height)), (round(left), titled))
        left += width + GAP
    for number, line in enumerate(lines):
        middle = titled + height + number * TITLE + TITLE / 2
        for x, name, color in line:
            corners = (x, middle - SWATCH / 2, x + SWATCH, middle + SWATCH / 2)
            pen.rectangle(corners, fill=color, outline="#888")
            pen.text((x + SWATCH + 5, middle), name, "black", font(TEXT), anchor="lm")
    return image


def _fit(text: str, width: float) -> str:
    """Shorten a text at its end to a width, pixels."""
    if font(TEXT).getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and font(TEXT).getlength(text[:kept] + "…") > width:
        kept -= 1
    return text[:kept] + "…"


def _legend_lines(legend: Sequence[tuple[str, Color]]) -> list[list[tuple[int, str, Color]]]:
    lines: list[list[tuple[int, str, Color]]] = []
    x = PAGE_WIDTH
    for name, color in legend:
        width = SWATCH + 5 + round(font(TEXT).getlength(name)) + 18
        if x + width > PAGE_WIDTH:
            lines.append([])
            x = 0
        lines[-1].append((x, name, color))
        x += width
    return lines


def resized(picture: Picture, size: tuple[int, int]) -> Image.Image:
    """Resize a picture, (H, W, 3), to (width, height)."""
    image = Image.fromarray(picture)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def enlarged(image: Picture, width: int | None = None) -> Picture:
    """Resize an image, (H, W, 3), to a width, or enlarge it to a height of ``MIN_HEIGHT``."""
    factor = max(1.0, MIN_HEIGHT / image.shape[0]) if width is None else width / image.shape[1]
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    return np.asarray(resized(image, size))


def nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Resample a map, (H, W), to (height, width) without mixing values."""
    rows, columns = (
        (np.arange(new) + 0.5) * old // new for new, old in zip(size, values.shape, strict=True)
    )
    return values[rows.astype(int)[:, None], columns.astype(int)]
