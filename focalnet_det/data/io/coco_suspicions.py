"""Boxes that are sound one by one, and together show that they are of another format."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .issues import Faults
from .json_files import Record
from .masks import is_polygon

XYXY = "boxes that look like [left, top, right, bottom]"
RELATIVE = "boxes that look relative to the size of the image"
SUSPICION_REMEDIES = {
    XYXY: "A box of COCO is [x, y, width, height], in absolute pixels: subtract left from right "
    "and top from bottom (tools/verify_dataset.py --fix does).",
    RELATIVE: "A box of COCO is [x, y, width, height] in absolute pixels: multiply by width and "
    "height of the image.",
}
# Fewer boxes prove nothing.
FEWEST_BOXES = 3
# Share of boxes that leave the image when they are read as width and height.
SHARE_OUTSIDE = 0.2
# Coordinates of polygons are smaller than this.
NEAR = (10**6, 10**6)
# IoU of a box and its mask's: below the first they contradict each other, above the second agree.
SMALLEST_OVERLAP = 0.5
SMALLEST_DISTANCE = 2.0
LARGE_OVERLAP = 0.9
# Share of boxes that are sound as corners.
SHARE_INSIDE = 0.98


def box_table(
    annotations: Sequence[Record], images: Mapping[int, Record]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    """Return the boxes of objects in images of known size.

    Returns: boxes (N, 4) as they are in the file; width and height of the image of each, (N, 2);
        and the index of each among ``annotations``.
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
    """Return whether boxes, read as xywh, leave their images, and read as xyxy, do not.

    Args:
        boxes: (N, 4), as in the file.
        sizes: width and height of the image of each, (N, 2).
    """
    boxes, sizes = boxes[np.isfinite(boxes).all(axis=1)], sizes[np.isfinite(boxes).all(axis=1)]
    if len(boxes) < FEWEST_BOXES:
        return False
    first, second = boxes[:, :2], boxes[:, 2:]
    as_corners = ((second > first) & (second <= sizes + 1)).all(axis=1).mean() >= SHARE_INSIDE
    return bool(as_corners and (first + second > sizes + 1).any(axis=1).mean() >= SHARE_OUTSIDE)


def look_relative(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> bool:
    """Return whether no box reaches beyond 1, in images that are larger; arguments as above."""
    boxes, sizes = boxes[np.isfinite(boxes).all(axis=1)], sizes[np.isfinite(boxes).all(axis=1)]
    return bool(len(boxes) >= FEWEST_BOXES and boxes.max() <= 1.0 and sizes.min() >= 8)


def mask_bounds(
    annotations: Sequence[Record], indices: Sequence[int]
) -> tuple[NDArray[np.float64], list[int]]:
    """Return the bounds, xyxy, of the sound polygons of annotations, and which have them.

    Returns: bounds (M, 4), and M positions in ``indices``.
    """
    bounds, positions = [], []
    for position, index in enumerate(indices):
        parts = annotations[index].get("segmentation")
        if isinstance(parts, list) and parts and all(is_polygon(part, NEAR) for part in parts):
            xs = [x for part in parts for x in (min(part[::2]), max(part[::2]))]
            ys = [y for part in parts for y in (min(part[1::2]), max(part[1::2]))]
            bounds.append((min(xs), min(ys), max(xs), max(ys)))
            positions.append(position)
    return np.array(bounds, dtype=np.float64).reshape(-1, 4), positions


def overlap(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of boxes, xyxy, (N, 4) each, pair by pair."""
    low, high = np.maximum(one[:, :2], two[:, :2]), np.minimum(one[:, 2:], two[:, 2:])
    inside = (high - low).clip(0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (one, two)]
    return inside / np.maximum(areas[0] + areas[1] - inside, 1e-9)


def check_boxes_together(
    annotations: Sequence[Record], images: Mapping[int, Record], faults: Faults
) -> int:
    """Add a fault if all boxes together are not xywh in pixels.

    Returns: how many boxes contradict their masks.
    """
    boxes, sizes, indices = box_table(annotations, images)
    bounds, positions = mask_bounds(annotations, indices)
    with np.errstate(invalid="ignore"):
        own = boxes[positions]
        xyxy = np.concatenate([own[:, :2], own[:, :2] + own[:, 2:]], axis=1)
        as_sizes, as_corners = overlap(xyxy, bounds), overlap(own, bounds)
        # Thin objects differ by a pixel or two, as one counts pixels or their centers.
        far = np.abs(xyxy - bounds).max(axis=1, initial=0) > SMALLEST_DISTANCE
        contradict = (as_sizes < SMALLEST_OVERLAP) & far
    agree = [(values > LARGE_OVERLAP).mean() for values in (as_sizes, as_corners) if len(own)]
    corners = len(own) >= FEWEST_BOXES and agree[0] < 0.2 and agree[1] > 0.8
    for kind, found in (
        (XYXY, corners or look_like_corners(boxes, sizes)),
        (RELATIVE, look_relative(boxes, sizes)),
    ):
        if found:
            for k in indices:
                row = annotations[k]
                faults.add(kind, f"annotation {row['id']}: {row['bbox']}")
    return int(contradict.sum())
