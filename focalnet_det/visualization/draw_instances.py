"""Draw instances on images, ground truth beside predictions."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.data import Metadata
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torchvision.utils import draw_bounding_boxes, draw_keypoints

from ..data.io.read_image import read_image
from .draw_semantic import palette
from .label_layout import Color, Label, draw_labels
from .objects import Objects, annotated_objects, predicted_objects, without_partner
from .sheet import Picture, Row, enlarged, panel_width

OPACITY = 0.45
# Frames of missed objects and false detections.
MARK, MARK_GROUND, DASH = (255, 23, 68), (255, 255, 255), 7
# Least confidence of a keypoint that is drawn, as in Detectron2.
KEYPOINT_THRESHOLD = 0.05


def class_colors(count: int) -> list[tuple[float, float, float]]:
    """Return an RGB color, 0..1, for each class; colors repeat after 20 classes."""
    colors = matplotlib.color_sequences["tab10" if count <= 10 else "tab20"]
    return [matplotlib.colors.to_rgb(colors[i % len(colors)]) for i in range(count)]


def object_colors(classes: Sequence[int], num_classes: int) -> list[Color]:
    """Return the color of each object, RGB 0..255: of its class, or its own if there is one class.

    Args:
        classes: class of each object.
        num_classes: of the dataset.
    """
    if num_classes == 1:
        # The color of the only class would say nothing.
        return palette(len(classes))
    # Matplotlib's 20 colors are easier to tell apart than many more.
    many = num_classes > 20
    colors = palette(num_classes) if many else [_bytes(c) for c in class_colors(num_classes)]
    return [colors[cls] for cls in classes]


def _bytes(color: tuple[float, float, float]) -> Color:
    red, green, blue = (round(255 * channel) for channel in color)
    return red, green, blue


def draw_objects(
    image: Picture,
    objects: Objects,
    metadata: Metadata,
    *,
    width: int | None = None,
    marked: NDArray[np.bool_] | None = None,
    mark: str = "",
    regions: Sequence[Label] = (),
) -> Picture:
    """Draw objects with a color for each class, or for each object if there is one class.

    Masks are filled and outlined; boxes are drawn for objects without masks. Labels stand beside
    the objects, and are left out where there is no place. With one class they are scores alone.

    Args:
        image: uint8 RGB, (H, W, 3).
        objects: of the image.
        metadata: with ``thing_classes``.
        width: of the result, pixels; None enlarges small images only.
        marked: bool (N,), objects to frame with dashes and to label first; None for none.
        mark: first word of their labels.
        regions: names of regions under the objects, at the width of the result.
    Returns: uint8 RGB, (h, w, 3).
    """
    picture = enlarged(image, width)
    if not len(objects):
        return draw_labels(picture, regions)
    names = metadata.thing_classes
    colors = object_colors(objects.classes.tolist(), len(names))
    masks = objects.regions((picture.shape[0], picture.shape[1]))
    scale = picture.shape[1] / objects.size[1]
    if objects.masks is not None:
        picture = _draw_masks(picture, masks, colors)
    else:
        picture = _draw_boxes(picture, objects.boxes * scale, colors)
    if objects.keypoints is not None:
        picture = _draw_keypoints(picture, objects.keypoints, scale, metadata)
    chosen = np.zeros(len(objects), dtype=bool) if marked is None else marked
    picture = _draw_marks(picture, objects.boxes[chosen] * scale)
    labels = [
        Label(text=text, mask=mask, color=color, urgent=bool(urgent))
        for text, mask, color, urgent in zip(
            _texts(objects, names, chosen, mark), masks, colors, chosen, strict=True
        )
        if text
    ]
    return draw_labels(picture, [*labels, *regions])


def _texts(
    objects: Objects, names: Sequence[str], marked: NDArray[np.bool_], mark: str
) -> list[str]:
    words: list[list[str]] = []
    for index, cls in enumerate(objects.classes.tolist()):
        words.append([mark] if marked[index] else [])
        words[-1] += [names[cls]] if len(names) > 1 else []
        words[-1] += [] if objects.scores is None else [f"{objects.scores[index]:.0%}"]
    return [" ".join(filter(None, parts)) for parts in words]


def _draw_masks(picture: Picture, masks: NDArray[np.bool_], colors: Sequence[Color]) -> Picture:
    """Blend colors into masks, large ones first, and outline them."""
    order = np.argsort(-masks.sum((1, 2)), kind="stable")
    drawn = picture.copy()
    for index in order:
        inside = masks[index]
        mixed = drawn[inside] * (1 - OPACITY) + np.array(colors[index]) * OPACITY
        drawn[inside] = np.rint(mixed)
    thickness = max(1, round(drawn.shape[0] / 400))
    for index in order:
        mask = masks[index].astype(np.uint8)
        outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, colors[index], thickness, cv2.LINE_AA)
    return drawn


def _draw_boxes(picture: Picture, boxes: NDArray[np.float64], colors: Sequence[Color]) -> Picture:
    width = max(2, round(picture.shape[0] / 220))
    drawn = draw_bounding_boxes(
        _tensor(picture), torch.from_numpy(boxes), colors=list(colors), width=width
    )
    return drawn.permute(1, 2, 0).numpy()


def _draw_keypoints(
    picture: Picture, keypoints: NDArray[np.float64], scale: float, metadata: Metadata
) -> Picture:
    names = list(metadata.get("keypoint_names") or ())
    rules = metadata.get("keypoint_connection_rules") or ()
    radius = max(2, round(picture.shape[0] / 180))
    drawn = draw_keypoints(
        _tensor(picture),
        torch.from_numpy(keypoints[..., :2] * scale),
        visibility=torch.from_numpy(keypoints[..., 2] > KEYPOINT_THRESHOLD),
        connectivity=[(names.index(a), names.index(b)) for a, b, _ in rules],
        colors=(255, 235, 59),
        radius=radius,
        width=radius,
    )
    return drawn.permute(1, 2, 0).numpy()


def _tensor(picture: Picture) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _draw_marks(picture: Picture, boxes: NDArray[np.float64]) -> Picture:
    """Frame boxes, (N, 4), with red dashes on white."""
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    width = max(2, round(picture.shape[0] / 220))
    for left, top, right, bottom in boxes + np.array([-width, -width, width, width]):
        corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        pen.line(corners, fill=MARK_GROUND, width=width)
        for start, end in pairwise(np.array(corners)):
            length = float(np.abs(end - start).sum())
            step = (end - start) / max(length, 1.0)
            for begin in np.arange(0, length, 2 * DASH):
                dash = start + step * begin, start + step * min(begin + DASH, length)
                pen.line([tuple(point) for point in dash], fill=MARK, width=width)
    return np.asarray(image)


def draw_ground_truth(
    record: dict[str, Any], metadata: Metadata, *, width: int | None = None
) -> Picture:
    """Draw the annotations of a record, cleaned as in training, on its image.

    Returns: uint8 RGB, (h, w, 3).
    """
    image = read_rgb(record)
    return draw_objects(image, _truth(record, image, metadata), metadata, width=width)


def draw_instances(
    image: Picture, instances: Any, metadata: Metadata, *, min_score: float
) -> Picture:
    """Draw predicted instances with at least ``min_score`` on an image, see :func:`draw_objects`.

    Args:
        image: (H, W, 3), uint8, RGB.
        instances: Detectron2 ``Instances`` at the image's size, on the CPU.
    Returns: (h, w, 3), uint8, RGB; larger than the image where that is small.
    """
    kept = instances[instances.scores >= min_score]
    return draw_objects(image, predicted_objects(kept), metadata)


def compare_instances(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
) -> Row:
    """Draw image, ground truth and predicted instances; missed and false ones have dashed frames.

    Args:
        record: in Detectron2's format, with annotations.
        output: of a model, with "instances" at the image's size.
        metadata: of the dataset.
        min_score: score threshold.
    """
    image = read_rgb(record)
    width = panel_width(3)
    instances = output["instances"].to("cpu")
    truth = _truth(record, image, metadata)
    predicted = predicted_objects(instances[instances.scores >= min_score])
    missed, false = without_partner(truth, predicted)
    left = draw_objects(image, truth, metadata, width=width, marked=missed, mark="missed")
    right = draw_objects(image, predicted, metadata, width=width, marked=false, mark="false")
    names = metadata.thing_classes
    legend = []
    if len(names) > 1:
        present = sorted({*truth.classes.tolist(), *predicted.classes.tolist()})
        colors = object_colors(present, len(names))
        legend = [(names[cls], color) for cls, color in zip(present, colors, strict=True)]
    panels = [
        (Path(record["file_name"]).name, image),
        (f"ground truth: {len(truth)}{_count(missed, 'missed')}", left),
        (f"prediction: {len(predicted)}{_count(false, 'false')}", right),
    ]
    return Row(panels=panels, legend=legend)


def _count(marked: NDArray[np.bool_], word: str) -> str:
    return f", {marked.sum()} {word} (dashed)" if marked.any() else ""


def _truth(record: dict[str, Any], image: Picture, metadata: Metadata) -> Objects:
    return annotated_objects(
        record.get("annotations", []),
        (image.shape[0], image.shape[1]),
        keypoints=bool(metadata.get("keypoint_names")),
    )


def read_rgb(record: dict[str, Any]) -> Picture:
    """Read the image of a record as uint8 RGB, (H, W, 3)."""
    return read_image(record["file_name"], "RGB")
