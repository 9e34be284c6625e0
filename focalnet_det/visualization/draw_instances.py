"""Draw instances on images, ground truth beside predictions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib import pyplot as plt
from torch import nn

from ..data.instances.mappers import clean_annotations
from ..data.io.read_image import read_image
from .figures import save_figure

# Pixels; smaller images are enlarged so that labels are legible.
MIN_HEIGHT = 420


def class_colors(count: int) -> list[tuple[float, float, float]]:
    """Return an RGB color, 0..1, for each class; colors repeat after 20 classes."""
    palette = matplotlib.color_sequences["tab10" if count <= 10 else "tab20"]
    return [matplotlib.colors.to_rgb(palette[i % len(palette)]) for i in range(count)]


def draw_ground_truth(record: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """Draw the annotations of a record, cleaned as in training, on its image.

    Returns: uint8 RGB, (H, W, 3).
    """
    image = read_rgb(record)
    annotations = record.get("annotations", [])
    masks = any(a.get("segmentation") for a in annotations)
    visible, _ = clean_annotations(annotations, (image.shape[0], image.shape[1]), masks=masks)
    classes = [a["category_id"] for a in visible]
    drawer = _drawer(image, metadata)
    drawer.overlay_instances(
        boxes=[a["bbox"] for a in visible] or None,
        masks=[a["segmentation"] for a in visible] if visible and masks else None,
        labels=[metadata.thing_classes[c] for c in classes],
        assigned_colors=_colors(classes, metadata),
    )
    return drawer.get_output().get_image()


def draw_predictions(
    record: dict[str, Any], instances: Any, metadata: Metadata, *, min_score: float
) -> np.ndarray:
    """Draw predicted instances on the image of a record.

    Args:
        record: in Detectron2's format.
        instances: Detectron2 ``Instances`` in the size of the original image, on the CPU.
        metadata: of the dataset.
        min_score: score threshold.
    Returns: uint8 RGB, (H, W, 3).
    """
    return draw_instances(read_rgb(record), instances, metadata, min_score=min_score)


def draw_instances(
    image: np.ndarray, instances: Any, metadata: Metadata, *, min_score: float
) -> np.ndarray:
    """Draw predicted instances with at least ``min_score`` on an image.

    Boxes, masks and keypoints are drawn, as far as there are any. Instances have a color each
    where the data has one class, else that of their class.

    Args:
        image: (H, W, 3), uint8, RGB.
        instances: Detectron2 ``Instances`` at the image's size, on the CPU.
    Returns: (h, w, 3), uint8, RGB; larger than the image where that is small.
    """
    kept = instances[instances.scores >= min_score]
    classes = kept.pred_classes.tolist()
    names = [metadata.thing_classes[c] for c in classes]
    labels = [f"{n} {s:.0%}" for n, s in zip(names, kept.scores.tolist(), strict=True)]
    drawer = _drawer(image, metadata)
    drawer.overlay_instances(
        boxes=kept.pred_boxes.tensor.numpy() if classes else None,
        masks=kept.pred_masks.numpy() if classes and kept.has("pred_masks") else None,
        keypoints=kept.pred_keypoints.numpy() if classes and kept.has("pred_keypoints") else None,
        labels=labels,
        assigned_colors=_colors(classes, metadata),
    )
    return drawer.get_output().get_image()


def save_comparison(
    model: nn.Module,
    records: Sequence[dict[str, Any]],
    inputs: Sequence[dict[str, Any]],
    metadata: Metadata,
    path: Path,
    *,
    min_score: float = 0.5,
    drawings: "RowDrawings | None" = None,
) -> None:
    """Save a PNG with one row of three pictures per image: image, ground truth, prediction.

    Args:
        model: a Detectron2 model in eval mode.
        records: in Detectron2's format, with annotations.
        inputs: model inputs of the same images.
        metadata: of the dataset.
        path: PNG to write.
        min_score: score threshold of instances.
        drawings: drawing functions; None for instances.
    """
    drawings = drawings or INSTANCES
    figure, axes = plt.subplots(
        len(records), 3, figsize=(9, 3.05 * len(records)), squeeze=False, layout="constrained"
    )
    for row, record, item in zip(axes, records, inputs, strict=True):
        with torch.no_grad():
            output = model([item])[0]
        pictures = drawings.pictures(record, output, metadata, min_score)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, title in zip(axes[0], drawings.titles, strict=True):
        axis.set_title(title)
    save_figure(figure, path)


def draw_output(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
) -> np.ndarray:
    """Draw the instances of a model output on the image of a record."""
    instances = output["instances"].to("cpu")
    return draw_predictions(record, instances, metadata, min_score=min_score)


class RowDrawings(Protocol):
    """Draws three pictures of an image, uint8 RGB, (H, W, 3)."""

    @property
    def titles(self) -> tuple[str, str, str]:
        """Return the titles of the columns."""

    def pictures(
        self,
        record: dict[str, Any],
        output: dict[str, Any],
        metadata: Metadata,
        min_score: float,
        /,
    ) -> Sequence[np.ndarray]:
        """Draw a record and the output of the model for it."""


@dataclass(frozen=True)
class Drawings:
    """Functions that draw ground truth and model outputs as uint8 RGB, (H, W, 3).

    Attributes:
        truth: called with (record, metadata).
        prediction: called with (record, model output, metadata, score threshold).
        titles: of the columns.
    """

    truth: Callable[[dict[str, Any], Metadata], np.ndarray]
    prediction: Callable[[dict[str, Any], dict[str, Any], Metadata, float], np.ndarray]
    titles: tuple[str, str, str] = ("image", "ground truth", "prediction")

    def pictures(
        self, record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
    ) -> Sequence[np.ndarray]:
        """Draw the image, the ground truth, and the prediction."""
        prediction = self.prediction(record, output, metadata, min_score)
        return read_rgb(record), self.truth(record, metadata), prediction


INSTANCES = Drawings(truth=draw_ground_truth, prediction=draw_output)


def read_rgb(record: dict[str, Any]) -> np.ndarray:
    """Read the image of a record as uint8 RGB, (H, W, 3)."""
    return read_image(record["file_name"], "RGB")


def _drawer(image: np.ndarray, metadata: Metadata) -> Visualizer:
    scale = max(1.0, MIN_HEIGHT / image.shape[0])
    return Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION)


def _colors(classes: Sequence[int], metadata: Metadata) -> list[tuple[float, ...]]:
    # One class says nothing: objects get a color each.
    if len(metadata.thing_classes) == 1:
        colors = class_colors(20)
        return [colors[i % len(colors)] for i in range(len(classes))]
    colors = class_colors(len(metadata.thing_classes))
    return [colors[i] for i in classes]
