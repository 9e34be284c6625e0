"""Build self-contained HTML pages with embedded style and images."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ..visualization.figures import save_figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #f4f6f8; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 19px; margin: 0 0 12px; }
p { margin: 4px 0 12px; color: #55606e; }
section { background: #fff; border: 1px solid #dde3ea; border-radius: 8px; padding: 20px;
  margin-top: 20px; overflow-x: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 16px; }
.tile { background: #fff; border: 1px solid #dde3ea; border-radius: 8px; padding: 10px 18px; }
.tile b { display: block; font-size: 26px; font-variant-numeric: tabular-nums; }
.tile span { color: #55606e; font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid #e8ecf1;
  white-space: nowrap; }
th { color: #55606e; font-weight: 600; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: normal; min-width: 12em; }
table + table { margin-top: 14px; }
td.bar { background: linear-gradient(#cfe3f7, #cfe3f7) no-repeat left; background-size: 0 70%;
  padding-left: 8px; min-width: 90px; }
figure { margin: 0 0 18px; }
figcaption { color: #55606e; font-size: 13px; margin-bottom: 4px; }
img { max-width: 100%; height: auto; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 20px;
  align-items: center; }
.columns > div { min-width: 0; }
"""


@dataclass(frozen=True)
class Bar:
    """Table cell with a percentage and a bar behind it."""

    value: float


@dataclass(frozen=True)
class Note:
    """Table cell with left-aligned text."""

    text: str


@dataclass
class Page:
    """HTML page of sections.

    Attributes:
        title, subtitle: plain text.
        tiles: (label, value) of key figures.
        sections: HTML, in order.
    """

    title: str
    subtitle: str
    tiles: list[tuple[str, str]] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def add(self, title: str, text: str, *parts: str) -> None:
        """Add a section.

        Args:
            title: plain text.
            text: plain text of the first paragraph; "" for none.
            parts: HTML.
        """
        body = f"<p>{escape(text)}</p>" if text else ""
        self.sections.append(f"<section><h2>{escape(title)}</h2>{body}{''.join(parts)}</section>")

    def html(self) -> str:
        """Render the page."""
        tiles = "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
            for label, value in self.tiles
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body><main>"
            f"<h1>{escape(self.title)}</h1><p>{escape(self.subtitle)}</p>"
            f'<div class="tiles">{tiles}</div>{"".join(self.sections)}</main></body></html>\n'
        )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Render a table.

    Args:
        header: column titles.
        rows: cells, each a string, a number (two decimals, "-" for NaN), a :class:`Bar` or a
            :class:`Note`.
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, Note):
        return f'<td class="text">{escape(value.text)}</td>'
    if isinstance(value, Bar):
        share = 0.0 if math.isnan(value.value) else min(max(value.value, 0.0), 100.0)
        style = f"background-size: {share:.1f}% 70%"
        return f'<td class="bar" style="{style}">{number(value.value)}</td>'
    return f"<td>{number(value) if isinstance(value, float) else escape(str(value))}</td>"


def number(value: float) -> str:
    """Format a number with two decimals; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def chart(figure: Figure, path: Path, caption: str = "") -> str:
    """Save a figure as PNG, close it, and embed it."""
    save_figure(figure, path, bbox_inches="tight")
    return saved_chart(path, caption)


def saved_chart(path: Path, caption: str = "") -> str:
    """Embed a PNG file."""
    return _embed(path.read_bytes(), "image/png", caption)


def photo(image: NDArray[np.uint8], caption: str = "") -> str:
    """Embed a uint8 RGB image, (H, W, 3), as JPEG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="jpeg", quality=85)
    return _embed(data.getvalue(), "image/jpeg", caption)


def _embed(data: bytes, mime_type: str, caption: str) -> str:
    source = f"data:{mime_type};base64,{base64.b64encode(data).decode('ascii')}"
    text = escape(caption, quote=True)
    title = f"<figcaption>{text}</figcaption>" if caption else ""
    return f'<figure>{title}<img src="{source}" alt="{text}"></figure>'


def columns(*parts: str) -> str:
    """Arrange HTML parts side by side if the window is wide enough."""
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def side_by_side(images: Sequence[NDArray[np.uint8]], gap: int = 8) -> NDArray[np.uint8]:
    """Concatenate images, (H, W, 3), horizontally, resized to the height of the first.

    Args:
        images: uint8 RGB.
        gap: white pixels between them.
    """
    height = images[0].shape[0]
    row: list[NDArray[np.uint8]] = []
    for image in images:
        if image.shape[0] != height:
            width = round(image.shape[1] * height / image.shape[0])
            image = np.asarray(Image.fromarray(image).resize((width, height)))
        row += [image, np.full((height, gap, 3), 255, dtype=np.uint8)]
    return np.concatenate(row[:-1], axis=1)
