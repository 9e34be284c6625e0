"""Draw semantic segmentation: overlays, comparisons with the ground truth, and IoU charts."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from ..data.io.labels import IGNORE, read_labels
from ..data.io.read_image import read_image
from .figures import save_figure
from .label_layout import Color, Label, draw_labels
from .sheet import Picture, Row, enlarged, nearest, panel_width, save_page

# Hue difference of consecutive classes, 1 for a full turn. With the (value, saturation) levels
# below, 150 colors differ by 9 of 255 or more, and those of consecutive classes by 99.
HUE_STEP = 0.3183
LEVELS = ((1, 0.9), (0.6, 0.9), (0.8, 0.5), (1, 0.4), (0.4, 0.8), (0.8, 0.9), (0.6, 0.45))
BLACK, WRONG = (0, 0, 0), (230, 30, 50)


def palette(count: int) -> list[Color]:
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
    colors: Sequence[Color],
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


def draw_classes(
    image: Picture,
    labels: NDArray[np.integer],
    class_names: Sequence[str],
    colors: Sequence[Color],
    *,
    width: int | None = None,
) -> Picture:
    """Blend class colors with an image, and write names into the regions that have room for them.

    Args:
        image: uint8 RGB, (H, W, 3).
        labels: (H, W), 255 for ignored pixels.
        class_names, colors: by class; RGB 0..255.
        width: of the result, pixels; None enlarges small images only.
    Returns: uint8 RGB, (h, w, 3).
    """
    picture = enlarged(image, width)
    scaled = nearest(labels, (picture.shape[0], picture.shape[1]))
    return draw_labels(overlay(picture, scaled, colors), class_labels(scaled, class_names, colors))


def class_labels(
    labels: NDArray[np.integer], class_names: Sequence[str], colors: Sequence[Color]
) -> list[Label]:
    """Return the names of the classes in a label map, (H, W), placed inside their regions."""
    return [
        Label(text=class_names[k], mask=labels == k, color=colors[k], inside=True)
        for k in present_classes(labels)
    ]


def present_classes(*labels: NDArray[np.integer]) -> list[int]:
    """Return the classes in label maps, ascending, without ignored pixels."""
    return sorted({int(k) for values in labels for k in np.unique(values)} - {IGNORE})


def comparison_row(
    image: Picture,
    truth: NDArray[np.integer],
    predicted: NDArray[np.integer],
    class_names: Sequence[str],
    colors: Sequence[Color],
    *,
    title: str,
) -> Row:
    """Draw image, ground truth, prediction, and the wrong pixels in red on a gray image.

    Args:
        image: uint8 RGB, (H, W, 3).
        truth, predicted: (H, W), 255 for ignored pixels.
        class_names, colors: by class; RGB 0..255.
        title: of the image.
    """
    width = panel_width(4)
    maps = [draw_classes(image, m, class_names, colors, width=width) for m in (truth, predicted)]
    labeled = truth != IGNORE
    wrong = labeled & (truth != predicted)
    gray = np.repeat(image.mean(axis=2, keepdims=True) / 2 + 100, 3, axis=2)
    gray[wrong] = WRONG
    gray[~labeled] = BLACK
    share = wrong.sum() / max(int(labeled.sum()), 1)
    return Row(
        panels=[
            (title, image),
            ("ground truth", maps[0]),
            ("prediction", maps[1]),
            (f"wrong: {share:.1%} of the labeled pixels", gray.astype(np.uint8)),
        ],
        legend=[(class_names[k], colors[k]) for k in present_classes(truth, predicted)],
    )


def compare_semantic(
    record: dict[str, Any],
    output: dict[str, Any],
    metadata: Any,
    min_score: float,  # noqa: ARG001
) -> Row:
    """Draw image, ground truth, prediction and wrong pixels of an image.

    Args:
        record: in Detectron2's format, with labels.
        output: of a model, with "sem_seg", scores (K, H, W).
        metadata: of the dataset.
        min_score: not used; classes of pixels have no threshold.
    """
    truth = read_labels(record["sem_seg_file_name"], record.get("label_rule"))
    return comparison_row(
        read_image(record["file_name"], "RGB"),
        truth,
        output["sem_seg"].argmax(dim=0).cpu().numpy(),
        metadata.stuff_classes,
        metadata.get("stuff_colors") or palette(len(metadata.stuff_classes)),
        title=Path(record["file_name"]).name,
    )


def save_comparison(
    rows: Sequence[tuple[str | Path, NDArray[np.integer], NDArray[np.integer], str]],
    class_names: Sequence[str],
    path: Path,
    colors: Sequence[Color] | None = None,
) -> None:
    """Save a PNG with one row per image: image, ground truth, prediction, errors, and a legend.

    Args:
        rows: image file, true labels and predicted labels, (H, W) each, and a title.
        class_names: in order of class.
        path: PNG to write.
        colors: RGB of each class, 0..255; None for those of :func:`palette`.
    """
    colors = colors or palette(len(class_names))
    save_page(
        [
            comparison_row(
                read_image(file, "RGB"), truth, predicted, class_names, colors, title=title
            )
            for file, truth, predicted, title in rows
        ],
        path,
    )


def save_iou_chart(
    iou: Mapping[str, float], path: Path, colors: Sequence[Color] | None = None
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


def fractions(color: Color) -> tuple[float, float, float]:
    """Convert RGB from 0..255 to 0..1, the range of matplotlib."""
    return color[0] / 255, color[1] / 255, color[2] / 255
