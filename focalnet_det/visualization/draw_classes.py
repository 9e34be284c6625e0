"""Draw image labels, predicted classes and reconstructed images."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from numpy.typing import NDArray

from .draw_instances import read_rgb
from .sheet import MIN_HEIGHT, Row

Image = NDArray[np.uint8]
RIGHT, WRONG, NEUTRAL = (60, 150, 60), (200, 60, 50), (70, 70, 70)
BEST = 3
MASKED_PARTS = ("image", "masked", "reconstruction")


def titled(image: Image, lines: list[str], color: tuple[int, int, int]) -> Image:
    """Return an image, (H, W, 3), with lines of text on a bar of a color below; small ones grow.

    Args:
        image: uint8 RGB.
        lines: of text.
        color: RGB of the bar, 0..255.
    """
    scale = max(1.0, MIN_HEIGHT / image.shape[0])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    enlarged = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else image
    line = max(24, enlarged.shape[0] // 14)
    bar = np.full((line * len(lines) + line // 3, enlarged.shape[1], 3), color, dtype=np.uint8)
    for row, text in enumerate(lines, start=1):
        cv2.putText(
            bar, text, (line // 4, row * line - line // 6), cv2.FONT_HERSHEY_SIMPLEX, line / 36,
            (255, 255, 255), max(1, line // 20), cv2.LINE_AA,
        )  # fmt: skip
    return np.concatenate([enlarged, bar])


def draw_label(record: dict[str, Any], metadata: Metadata) -> Image:
    """Draw the class of a record below its image."""
    return titled(read_rgb(record), [metadata.thing_classes[record["label"]]], NEUTRAL)


def draw_scores(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
) -> Image:
    """Draw the best classes below an image, green if the first is right, red if it is wrong.

    Args:
        record: with "label".
        output: with "class_scores": logits, (K,).
        metadata: of the dataset.
        min_score: least probability of a class, apart from the first, times 0.1.
    """
    names = metadata.thing_classes
    probabilities = output["class_scores"].float().cpu()[: len(names)].softmax(dim=0)
    best = probabilities.topk(min(BEST, len(names)))
    pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    shown = [pair for k, pair in enumerate(pairs) if k == 0 or pair[1] >= 0.1 * min_score]
    color = RIGHT if pairs[0][0] == record["label"] else WRONG
    return titled(read_rgb(record), [f"{names[k]} {value:.0%}" for k, value in shown], color)


def compare_classes(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
) -> Row:
    """Draw an image with its class, and with the best classes, see :func:`draw_scores`."""
    truth = draw_label(record, metadata)
    prediction = draw_scores(record, output, metadata, min_score)
    return Row(panels=[("ground truth", truth), ("prediction", prediction)])


def compare_masked_images(
    _record: dict[str, Any], output: dict[str, Any], _metadata: Metadata, _min_score: float
) -> Row:
    """Draw an image, as the model sees it with its masked pixels in gray, and reconstructed."""
    return Row(panels=masked_image_panels(output))


def masked_image_panels(output: Mapping[str, Any]) -> list[tuple[str, Image]]:
    """Return titles and pictures of an output with "masked_image"."""
    parts = output["masked_image"]
    return [(name, parts[name].numpy().transpose(1, 2, 0)) for name in MASKED_PARTS]
