"""Collect the objects of an image for drawing, and find which of them have no partner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.utils.visualizer import GenericMask
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from ..data.instances.mappers import clean_annotations

# IoU from which a detection is one of an object, as in AP50.
MATCH_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Objects of one image.

    Attributes:
        size: height and width of the image, pixels.
        boxes: (N, 4), xyxy, absolute pixels.
        classes: (N,).
        scores: (N,), None for ground truth.
        masks: bool (N, H, W), None for none.
        keypoints: (N, K, 3) of x, y and visibility or score; None for none.
        crowds: RLE of regions of uncounted objects, each with its class.
    """

    size: tuple[int, int]
    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]
    scores: NDArray[np.float64] | None = None
    masks: NDArray[np.bool_] | None = None
    keypoints: NDArray[np.float64] | None = None
    crowds: Sequence[tuple[dict[str, Any], int]] = ()

    def __len__(self) -> int:
        return len(self.classes)

    def regions(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Return the masks, or filled boxes if there are none, bool (N, h, w).

        Args:
            size: height and width of the picture that they are for, pixels.
        """
        height, width = size
        result = np.zeros((len(self), height, width), dtype=bool)
        if self.masks is not None:
            for row, mask in zip(result, self.masks, strict=True):
                row[:] = cv2.resize(mask.astype(np.float32), (width, height)) >= 0.5
            return result
        scale = np.array([width / self.size[1], height / self.size[0]] * 2)
        for row, box in zip(result, self.boxes * scale, strict=True):
            left, top = np.floor(box[:2]).astype(int)
            right, bottom = np.ceil(box[2:]).astype(int)
            row[max(top, 0) : bottom, max(left, 0) : right] = True
        return result


def annotated_objects(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], *, keypoints: bool = False
) -> Objects:
    """Return the annotations of an image, cleaned as in training, without crowds.

    Args:
        annotations: in Detectron2's format.
        size: height and width of the image, pixels.
        keypoints: whether to draw keypoints, which not all objects may have.
    """
    has_masks = any(a.get("segmentation") for a in annotations)
    rows, _ = clean_annotations(annotations, size, masks=has_masks)
    masks = None
    if has_masks:
        masks = np.zeros((len(rows), *size), dtype=bool)
        for mask, row in zip(masks, rows, strict=True):
            mask[:] = GenericMask(row["segmentation"], *size).mask
    crowds = [
        (encoded(GenericMask(a["segmentation"], *size).mask), a["category_id"])
        for a in annotations
        if a.get("iscrowd") and isinstance(a.get("segmentation"), dict)
    ]
    points = None
    if keypoints and rows and all("keypoints" in row for row in rows):
        points = np.array([row["keypoints"] for row in rows]).reshape(len(rows), -1, 3)
    return Objects(
        size=size,
        boxes=np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4),
        classes=np.array([row["category_id"] for row in rows], dtype=np.int64),
        masks=masks,
        keypoints=points,
        crowds=crowds,
    )


def predicted_objects(instances: Any) -> Objects:
    """Return Detectron2 ``Instances`` of predictions, on the CPU, for drawing."""

    def field(name: str) -> NDArray[Any] | None:
        return instances.get(name).numpy() if instances.has(name) else None

    return Objects(
        size=instances.image_size,
        boxes=instances.pred_boxes.tensor.double().numpy(),
        classes=instances.pred_classes.numpy(),
        scores=instances.scores.double().numpy(),
        masks=field("pred_masks"),
        keypoints=field("pred_keypoints"),
    )


def without_partner(
    truth: Objects, predicted: Objects
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Find missed objects and false detections.

    A detection is of the object of its class that no better detection has and that it overlaps
    most, by masks if both have them, at an IoU of at least ``MATCH_IOU``. A detection that lies to
    as large a part in a crowd of its class is not false. This is COCO's matching at that IoU.

    Returns: which objects are missed, (N,), and which detections are false, (M,).
    """
    missed, false = np.ones(len(truth), dtype=bool), np.ones(len(predicted), dtype=bool)
    if not len(predicted):
        return missed, false
    overlaps = _overlaps(predicted, truth)
    scores = np.zeros(len(predicted)) if predicted.scores is None else predicted.scores
    for index in np.argsort(-scores, kind="stable"):
        same = missed & (truth.classes == predicted.classes[index])
        row = np.where(same, overlaps[index, : len(truth)], 0)
        best = int(row.argmax()) if len(row) else 0
        if len(row) and row[best] >= MATCH_IOU:
            missed[best] = false[index] = False
            continue
        crowds = overlaps[index, len(truth) :]
        classes = np.array([cls for _, cls in truth.crowds], dtype=np.int64)
        if (crowds[classes == predicted.classes[index]] >= MATCH_IOU).any():
            false[index] = False
    return missed, false


def _overlaps(predicted: Objects, truth: Objects) -> NDArray[np.float64]:
    """Return IoU with objects, then the covered share by crowds, (M, N + crowds)."""
    crowds = [rle for rle, _ in truth.crowds]
    is_crowd = [0] * len(truth) + [1] * len(crowds)
    if not is_crowd:
        return np.zeros((len(predicted), 0))
    if predicted.masks is not None and truth.masks is not None:
        rows: list[Any] = [encoded(mask) for mask in predicted.masks]
        columns: list[Any] = [encoded(mask) for mask in truth.masks] + crowds
    else:
        rows = [_xywh(box) for box in predicted.boxes]
        columns = [_xywh(box) for box in truth.boxes]
        columns += [list(map(float, mask_utils.toBbox(rle))) for rle in crowds]
    result: NDArray[np.float64] = np.asarray(mask_utils.iou(rows, columns, is_crowd))
    return result.reshape(len(predicted), len(is_crowd))


def _xywh(box: NDArray[np.float64]) -> list[float]:
    return [*map(float, box[:2]), *map(float, box[2:] - box[:2])]


def encoded(mask: NDArray[Any]) -> dict[str, Any]:
    """Return a mask, (H, W), as RLE."""
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
