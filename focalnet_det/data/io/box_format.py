"""Detect boxes in other formats than COCO's from their joint statistics."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .issues import ValidationErrors
from .json_files import Record
from .masks import is_polygon

XYXY = "boxes that look like [left, top, right, bottom]"
RELATIVE = "boxes that look relative to the image size"
BOX_FORMAT_REMEDIES = {
    XYXY: "COCO boxes are [x, y, width, height] in absolute pixels. Subtract left from right and "
    "top from bottom (tools/verify_dataset.py --fix does so).",
    RELATIVE: "COCO boxes are [x, y, width, height] in absolute pixels. Multiply by width and "
    "height of the image.",
}
# Fewer boxes are not conclusive.
MIN_BOXES = 3
# Least share of boxes that must leave the image when read as xywh.
MIN_SHARE_OUTSIDE = 0.2
# Image size that bounds polygons of images of unknown size, pixels.
POLYGON_BOUNDS = (10**6, 10**6)
# IoU of a box and the bounding box of its mask: below the first value they contradict each other if
# a side also differs by more than MAX_SIDE_DIFFERENCE pixels; above the second they agree.
CONTRADICTION_IOU = 0.5
MAX_SIDE_DIFFERENCE = 2.0
AGREEMENT_IOU = 0.9
# Least share of boxes that must be valid when read as xyxy.
MIN_SHARE_INSIDE = 0.98


def box_table(
    annotations: Sequence[Record], images: Mapping[int, Record]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    """Collect the boxes of objects in images of known size.

    Returns: boxes as in the file, (N, 4); width and height of the image of each, (N, 2); and the
        index of each in ``annotations``.
    """
    indices = [
        index
        for index, row in enumerate(annotations)
        if not row.get("iscrowd")
        and isinstance(row.get("bbox"), list | tuple)
        and len(row["bbox"]) == 4
        and "height" in images[row["image_id"]]
    ]
    boxes, sizes = np.zeros((len(indices), 4)), np.zeros((len(indices), 2))
    for k, index in enumerate(indices):
        image = images[annotations[index]["image_id"]]
        try:
            boxes[k] = annotations[index]["bbox"]
        except (TypeError, ValueError, OverflowError):
            boxes[k] = np.nan
        sizes[k] = image["width"], image["height"]
    return boxes, sizes, indices


def look_like_corners(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> bool:
    """Return whether boxes leave their images when read as xywh, but not when read as xyxy.

    Args:
        boxes: as in the file, (N, 4).
        sizes: width and height of the image of each, (N, 2), pixels.
    """
    boxes, sizes = boxes[np.isfinite(boxes).all(axis=1)], sizes[np.isfinite(boxes).all(axis=1)]
    if len(boxes) < MIN_BOXES:
        return False
    first, second = boxes[:, :2], boxes[:, 2:]
    is_inside = ((second > first) & (second <= sizes + 1)).all(axis=1)
    leaves_image = (first + second > sizes + 1).any(axis=1)
    return bool(is_inside.mean() >= MIN_SHARE_INSIDE and leaves_image.mean() >= MIN_SHARE_OUTSIDE)


def look_relative(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> bool:
    """Return whether no coordinate exceeds 1, although the images are larger.

    Arguments as in ``look_like_corners``.
    """
    boxes, sizes = boxes[np.isfinite(boxes).all(axis=1)], sizes[np.isfinite(boxes).all(axis=1)]
    return bool(len(boxes) >= MIN_BOXES and boxes.max() <= 1.0 and sizes.min() >= 8)


def mask_bounds(
    annotations: Sequence[Record], indices: Sequence[int]
) -> tuple[NDArray[np.float64], list[int]]:
    """Compute the bounding boxes of valid polygon masks.

    Args:
        annotations: of a file.
        indices: those to look at.
    Returns: bounds, (M, 4), xyxy, pixels, and M positions in ``indices``.
    """
    bounds, positions = [], []
    for position, index in enumerate(indices):
        parts = annotations[index].get("segmentation")
        if (
            isinstance(parts, list)
            and parts
            and all(is_polygon(part, POLYGON_BOUNDS) for part in parts)
        ):
            xs = [x for part in parts for x in (min(part[::2]), max(part[::2]))]
            ys = [y for part in parts for y in (min(part[1::2]), max(part[1::2]))]
            bounds.append((min(xs), min(ys), max(xs), max(ys)))
            positions.append(position)
    return np.array(bounds, dtype=np.float64).reshape(-1, 4), positions


def paired_iou(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of each pair of boxes, (N,); both arguments are (N, 4), xyxy."""
    low, high = np.maximum(one[:, :2], two[:, :2]), np.minimum(one[:, 2:], two[:, 2:])
    inside = (high - low).clip(0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (one, two)]
    return inside / np.maximum(areas[0] + areas[1] - inside, 1e-9)


def check_box_format(
    annotations: Sequence[Record], images: Mapping[int, Record], errors: ValidationErrors
) -> int:
    """Add an error if the boxes of a file are not xywh in absolute pixels.

    Args:
        annotations: of a file.
        images: of the file, by id.
        errors: collects errors.
    Returns: number of boxes that contradict their masks.
    """
    boxes, sizes, indices = box_table(annotations, images)
    bounds, positions = mask_bounds(annotations, indices)
    with np.errstate(invalid="ignore"):
        masked = boxes[positions]
        xyxy = np.concatenate([masked[:, :2], masked[:, :2] + masked[:, 2:]], axis=1)
        xywh_iou, xyxy_iou = paired_iou(xyxy, bounds), paired_iou(masked, bounds)
        # Thin objects may differ by a pixel or two, depending on whether a tool measures between
        # pixel centers or edges.
        is_far = np.abs(xyxy - bounds).max(axis=1, initial=0) > MAX_SIDE_DIFFERENCE
        contradicts = (xywh_iou < CONTRADICTION_IOU) & is_far
    agree = [(values > AGREEMENT_IOU).mean() for values in (xywh_iou, xyxy_iou) if len(masked)]
    corners = len(masked) >= MIN_BOXES and agree[0] < 0.2 and agree[1] > 0.8
    for kind, detected in (
        (XYXY, corners or look_like_corners(boxes, sizes)),
        (RELATIVE, look_relative(boxes, sizes)),
    ):
        if detected:
            for k in indices:
                row = annotations[k]
                errors.add(kind, f"annotation {row['id']}: {row['bbox']}")
    return int(contradicts.sum())
