"""Report classification: confusions between classes, and the images that are most wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.io.read_image import read_image
from ..evaluation.classification_accuracy import METRICS_FILE
from .page import Page, chart, columns, photo, table
from .semantic_section import LARGEST_MATRIX, confusion_figure, top_confusions

# Pixels.
PHOTO_SIDE = 220
PHOTOS_IN_A_ROW = 4


def add_classification(page: Page, folder: Path) -> None:
    """Add the sections of classification.

    Args:
        page: report.
        folder: output folder of the evaluation, with ``classification_metrics.json``.
    """
    content = json.loads((folder / METRICS_FILE).read_text())
    classes = content["classes"]
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for true, predicted, count in content["confusion"]:
        confusion[true, predicted] = count
    rows = top_confusions(confusion, classes)
    if rows:
        page.add(
            "Largest confusions",
            "Pairs of classes with the most misclassified images, and their share of the true "
            "class.",
            table(["true class", "predicted class", "% of true class", "images"], rows),
        )
    if len(classes) <= LARGEST_MATRIX:
        page.add(
            "Confusion matrix",
            "Percentage of each true class (rows) by predicted class (columns).",
            chart(confusion_figure(confusion, classes), folder / "confusion_classification.png"),
        )
    photos = [_photo(row, classes) for row in content["worst"]]
    page.add(
        "Worst images",
        "Those with the lowest probability of their class.",
        *(
            columns(*photos[k : k + PHOTOS_IN_A_ROW])
            for k in range(0, len(photos), PHOTOS_IN_A_ROW)
        ),
    )


def _photo(row: dict[str, Any], classes: list[str]) -> str:
    image = Image.fromarray(read_image(row["file_name"], "RGB"))
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    caption = (
        f"{classes[row['label']]} {row['probability']:.1%}; predicted "
        f"{classes[row['predicted'][0]]} {row['scores'][0]:.1%}"
    )
    return photo(np.asarray(image), caption)
