"""Draw semantic segmentation: overlays, comparisons with the ground truth, and IoU charts."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ..data.io.labels import IGNORE
from ..data.io.read_image import read_image
from .figures import save_figure

# Hue difference of consecutive classes, 1 for a full turn. With the (value, saturation) levels
# below, 150 colors differ by 9 of 255 or more, and those of consecutive classes by 99.
HUE_STEP = 0.3183
LEVELS = ((1, 0.9), (0.6, 0.9), (0.8, 0.5), (1, 0.4), (0.4, 0.8), (0.8, 0.9), (0.6, 0.45))
BLACK = (0, 0, 0)


def palette(count: int) -> list[tuple[int, int, int]]:
    """Return a color for each class, RGB 0..255; consecutive classes have distant hues."""
    colors = []
    for index in range(count):
        value, saturation = LEVELS[index % len(LEVELS)]
        red, green, blue = colorsys.hsv_to_rgb((index * HUE_STEP) % 1, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def overlay(
    image: NDArray[np.uint8],
    labels: NDArray[np.integer],
    colors: Sequence[tuple[int, int, int]],
    *,
    opacity: float = 0.6,
) -> NDArray[np.uint8]:
    """Blend class colors with an image; ignored pixels are darkened.

    Args:
        image: uint8 RGB, (H, W, 3).
        labels: (H, W), 255 for ignored pixels.
        colors: RGB of each class, 0..255.
        opacity: of the colors, 0..1.
    Returns: uint8 RGB, (H, W, 3).
    """
    table = np.array([*colors, BLACK], dtype=np.float32)
    indices = np.where(labels == IGNORE, len(colors), labels)
    mixed = image * (1 - opacity) + table[indices] * opacity
    return np.rint(mixed).astype(np.uint8)


def add_legend(
    axis: Axes,
    shown: Sequence[int],
    class_names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
) -> None:
    """Add a legend of the given classes below an axis."""
    patches = [Patch(color=fractions(colors[k]), label=class_names[k]) for k in shown]
    axis.legend(
        handles=patches,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=3,
        fontsize=7,
        frameon=False,
    )


def save_comparison(
    rows: Sequence[tuple[str | Path, NDArray[np.integer], NDArray[np.integer], str]],
    class_names: Sequence[str],
    path: Path,
    colors: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Save a PNG with one row per image: image, ground truth, prediction, and a legend.

    Args:
        rows: image file, true labels and predicted labels, (H, W) each, and a title.
        class_names: in order of class.
        path: PNG to write.
        colors: RGB of each class, 0..255; None for those of :func:`palette`.
    """
    colors = colors or palette(len(class_names))
    height = 3.4
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(12, height * len(rows)), squeeze=False, layout="constrained"
    )
    for axis_row, (file, truth, predicted, title) in zip(axes, rows, strict=True):
        image = read_image(file, "RGB")
        axis_row[0].imshow(image)
        axis_row[1].imshow(overlay(image, truth, colors))
        axis_row[2].imshow(overlay(image, predicted, colors))
        axis_row[0].set_title(title, fontsize=9)
        for axis in axis_row:
            axis.set_axis_off()
        shown = sorted((set(np.unique(truth)) | set(np.unique(predicted))) - {IGNORE})
        add_legend(axis_row[1], [int(k) for k in shown], class_names, colors)
    for axis, title in zip(axes[0, 1:], ("ground truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=9)
    save_figure(figure, path)


def save_iou_chart(
    iou: Mapping[str, float], path: Path, colors: Sequence[tuple[int, int, int]] | None = None
) -> None:
    """Save a bar chart of class IoU, best class first, classes without IoU (NaN) last.

    Args:
        iou: percent, by class name, in order of class.
        path: PNG to write.
        colors: RGB of each class, 0..255; None for those of :func:`palette`.
    """
    colors = colors or palette(len(iou))
    order = sorted(iou, key=lambda name: (math.isnan(iou[name]), -iou[name]))
    by_name = dict(zip(iou, colors, strict=True))
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.22 * len(iou)), layout="constrained")
    values = [0.0 if math.isnan(iou[name]) else iou[name] for name in order]
    bars = axis.barh(range(len(order)), values, color=[fractions(by_name[name]) for name in order])
    texts = ["no ground truth" if math.isnan(iou[n]) else f"{iou[n]:.1f}" for n in order]
    axis.bar_label(bars, texts, padding=3, fontsize=7)
    axis.set_yticks(range(len(order)), order, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 110)
    axis.set_xlabel("IoU, %")
    save_figure(figure, path)


def fractions(color: tuple[int, int, int]) -> tuple[float, float, float]:
    """Convert RGB from 0..255 to 0..1, the range of matplotlib."""
    return color[0] / 255, color[1] / 255, color[2] / 255
