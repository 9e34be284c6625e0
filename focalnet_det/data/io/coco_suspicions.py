"""Boxes that are sound one by one, and together show that they are of another format."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .faults import Faults
from .json_files import Record

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


def check_boxes_together(
    annotations: Sequence[Record], images: Mapping[int, Record], faults: Faults
) -> None:
    """Add a fault if all boxes together are not xywh in pixels."""
    boxes, sizes, indices = box_table(annotations, images)
    for kind, suspect in ((XYXY, look_like_corners), (RELATIVE, look_relative)):
        if suspect(boxes, sizes):
            for k in indices:
                row = annotations[k]
                faults.add(kind, f"annotation {row['id']}: {row['bbox']}")
