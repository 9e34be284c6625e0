"""Validate and repair box, mask, area and keypoints of a COCO annotation."""

from typing import Any, TypeGuard

from ..issue_policies import (
    AREA_REPLACED,
    BOX_FROM_MASK,
    MALFORMED_BOX,
    MALFORMED_MASK,
    MALFORMED_PART,
)
from .issues import ValidationErrors, shorten
from .json_files import Record, float_list, is_number
from .masks import mask_area_and_box, valid_part

# Issues for which training drops an object -> name of the error in evaluation.
DROPPED = {
    MALFORMED_BOX: "objects with a malformed box",
    MALFORMED_MASK: "objects with a malformed mask",
}
OBJECT_REMEDIES = {
    "objects with a malformed box": "A box is [x, y, width, height], four finite numbers, in "
    "absolute pixels.",
    "objects with a malformed mask": "A mask is a list of polygons [[x, y, x, y, ...], ...] of "
    "three points or more, or RLE of the size of the image.",
    "objects with malformed keypoints": "keypoints lists x, y, v for each keypoint name of the "
    "category; v is 0, 1 or 2.",
    "objects with keypoints in a category without keypoint names": "Add the list of names as "
    "`keypoints` of the category.",
}
# Bounds of plausible areas, as a factor of the box area and in pixels; official files stay below.
MAX_AREA_RATIO = 2.0
AREA_SLACK = 32.0


def is_box(values: Any) -> TypeGuard[list[float]]:
    """Return whether a box, xywh, is four finite numbers with nonnegative width and height."""
    box = float_list(values, 4)
    return box is not None and box[2] >= 0 and box[3] >= 0


def check_object(
    row: Record, size: tuple[int, int] | None, points: int, where: object, errors: ValidationErrors
) -> tuple[Record, list[str]]:
    """Check box, mask and keypoints of an annotation; compute a missing box from the mask.

    Args:
        row: the annotation.
        size: height and width of its image, pixels; None if unknown.
        points: number of keypoints per annotation, 0 for none.
        where: location of the row, for messages.
        errors: collects errors.
    Returns: the annotation, a copy if it was repaired, and its issues of ``ISSUE_POLICIES``.
    """
    _check_keypoints(row, points, where, errors)
    segmentation = row.get("segmentation")
    has_mask = segmentation is not None and segmentation not in ([], "")
    valid = valid_part(segmentation, size) if has_mask else None
    problems = []
    if has_mask and valid is None:
        problems = [MALFORMED_MASK]
    elif valid is not segmentation and has_mask:
        row, problems = {**row, "segmentation": valid}, [MALFORMED_PART]
    if is_box(row.get("bbox")):
        return row, problems
    area_and_box = None if valid is None or size is None else mask_area_and_box(valid, size)
    if area_and_box is None:
        return row, [MALFORMED_BOX, *problems]
    return {**row, "bbox": area_and_box[1]}, [BOX_FROM_MASK, *problems]


def repair_area(row: Record, size: tuple[int, int] | None) -> tuple[Record, list[str]]:
    """Replace an implausible area by that of the mask, or of the box if there is no mask.

    Args:
        row: an annotation with a valid box.
        size: height and width of its image, pixels; None if unknown.
    Returns: as ``check_object``.
    """
    _, _, width, height = row["bbox"]
    area, box_area = row.get("area"), width * height
    if is_number(area) and box_area < 1 and 0 <= area <= AREA_SLACK:
        return row, []
    if is_number(area) and 0 < area <= MAX_AREA_RATIO * box_area + AREA_SLACK:
        return row, []
    segmentation = row.get("segmentation")
    measured = mask_area_and_box(segmentation, size) if size is not None and segmentation else None
    return {**row, "area": measured[0] if measured else box_area}, [AREA_REPLACED]


def _check_keypoints(row: Record, points: int, where: object, errors: ValidationErrors) -> None:
    values = row.get("keypoints")
    if values is None or values == []:
        return
    if not points:
        errors.add("objects with keypoints in a category without keypoint names", where)
        return
    found = float_list(values, 3 * points)
    if found is None or not {0.0, 1.0, 2.0}.issuperset(found[2::3]):
        errors.add("objects with malformed keypoints", f"{where}: {shorten(values)}")
