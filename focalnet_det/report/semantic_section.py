"""Report semantic segmentation: confusions between classes, and example images."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, Metadata
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..data.io.labels import read_labels, read_values
from ..data.io.read_image import read_image
from ..evaluation.semantic_iou import prediction_path
from ..visualization.draw_semantic import comparison_row, palette
from .page import Bar, Note, Page, chart, photo, side_by_side, table

IMAGES = 3
CONFUSIONS = 12
LARGEST_MATRIX = 40

Counts = NDArray[np.int64]


def add_semantic(page: Page, metadata: Metadata, folder: Path) -> None:
    """Add the sections of semantic segmentation.

    Args:
        page: report.
        metadata: of the dataset.
        folder: output folder of the evaluation, with ``sem_seg_metrics.json`` and ``predictions``.
    """
    content = json.loads((folder / "sem_seg_metrics.json").read_text())
    classes, confusion = content["classes"], np.array(content["confusion"], dtype=np.int64)
    rows = top_confusions(confusion, classes)
    page.add(
        "Largest confusions",
        "Pairs of classes with the most misclassified pixels, and their share of the true class.",
        table(["true class", "predicted class", "% of true class", "pixels"], rows),
    )
    if len(classes) <= LARGEST_MATRIX:
        figure = confusion_figure(confusion, classes)
        page.add(
            "Confusion matrix",
            "Percentage of each true class (rows) by predicted class (columns).",
            chart(figure, folder / "confusion_sem_seg.png"),
        )
    _add_images(page, content["image_mIoU"], classes, metadata, folder)


def top_confusions(confusion: Counts, classes: Sequence[str]) -> list[list[Any]]:
    """Return rows (true class, predicted class, share of the true class in percent, pixels).

    Args:
        confusion: (K, K), rows are true classes, columns predicted ones.
        classes: K names.
    """
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:CONFUSIONS]
    rows: list[list[Any]] = []
    for index in order:
        true, predicted = divmod(int(index), len(classes))
        pixels = int(wrong[true, predicted])
        if pixels:
            share = 100 * pixels / int(confusion[true].sum())
            rows.append([classes[true], Note(classes[predicted]), Bar(share), f"{pixels:,}"])
    return rows


def confusion_figure(confusion: Counts, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, (K, K), with rows in percent; numbers are shown up to K = 20."""
    total = confusion.sum(axis=1, keepdims=True)
    shares = 100 * confusion / np.maximum(total, 1)
    side = 2.2 + 0.42 * len(classes)
    figure, axis = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(image, ax=axis, shrink=0.7, label="% of the true class")
    if len(classes) <= 20:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                color = "white" if share > 55 else "#333"
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7)
                axis.texts[-1].set_color(color)
    return figure


def _add_images(
    page: Page,
    image_iou: Mapping[str, float | None],
    classes: Sequence[str],
    metadata: Metadata,
    folder: Path,
) -> None:
    colors = metadata.get("stuff_colors") or palette(len(classes))
    records = {str(r["file_name"]): r for r in DatasetCatalog.get(metadata.name)}
    scored = {
        name: value
        for name, value in image_iou.items()
        if value is not None and not math.isnan(value) and name in records
    }
    order = sorted(scored, key=lambda name: scored[name])
    count = min(IMAGES, len(order) // 2)
    ends = {"Worst images": order[:count], "Best images": order[::-1][:count]}
    for title, names in ends.items():
        photos, seen = [], set()
        for name in names:
            record = records[name]
            path = prediction_path(folder, name, metadata.get("image_root"))
            if not path.exists():
                continue
            image = read_image(name, "RGB")
            truth = read_labels(record["sem_seg_file_name"], record.get("label_rule"))
            predicted = read_values(path)
            seen |= set(np.unique(truth)) | set(np.unique(predicted))
            row = comparison_row(image, truth, predicted, classes, colors, title="")
            caption = f"{Path(name).name}: mIoU {100 * scored[name]:.1f}; {row.panels[-1][0]}"
            photos.append(photo(side_by_side([picture for _, picture in row.panels]), caption))
        if photos:
            present = [int(k) for k in sorted(seen) if k < len(classes)]
            page.add(
                title,
                "Image, ground truth, prediction, errors; mIoU is over the classes of the image.",
                _legend(present, classes, colors),
                *photos,
            )


def _legend(
    present: Sequence[int], classes: Sequence[str], colors: Sequence[tuple[int, int, int]]
) -> str:
    items = "".join(
        f'<span style="display:inline-block;margin-right:14px"><span style="display:inline-block;'
        f"width:12px;height:12px;margin-right:5px;border-radius:2px;"
        f'background:rgb{tuple(colors[k])}"></span>{escape(classes[k])}</span>'
        for k in present
    )
    return f"<p>{items}</p>"
