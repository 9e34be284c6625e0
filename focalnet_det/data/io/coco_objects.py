"""One annotation of a COCO file: its box, mask, area and keypoints."""

from typing import Any, TypeGuard

from ..issue_policies import (
    AREA_REPLACED,
    BOX_FROM_MASK,
    MALFORMED_BOX,
    MALFORMED_MASK,
    MALFORMED_PART,
)
from .issues import Faults, shown
from .json_files import Record, is_number, numbers
from .masks import mask_area_and_box, sound_mask

# Issues of ``ISSUE_POLICIES`` for which training drops an object: what evaluation calls them.
DROPPED = {
    MALFORMED_BOX: "objects with a malformed box",
    MALFORMED_MASK: "objects with a malformed mask",
}
OBJECT_REMEDIES = {
    "objects with a malformed box": "A box is [x, y, width, height], four finite numbers, in "
    "absolute pixels.",
    "objects with a malformed mask": "A mask is a list of polygons [[x, y, x, y, ...], ...] of "
    "three points or more, or RLE of the size of the image.",
    "objects with malformed keypoints": "keypoints is x, y, v for each name of the category, and "
    "v is 0, 1 or 2.",
    "objects with keypoints of a category that names none": "Add the list `keypoints` of names to "
    "the category.",
}
# Areas of official files differ from the pixels by less.
LARGEST_SHARE_OF_BOX = 2.0
AREA_SLACK = 32.0


def is_box(values: Any) -> TypeGuard[list[float]]:
    """Return whether a box, xywh, is four finite numbers, the last two not negative."""
    box = numbers(values, 4)
    return box is not None and box[2] >= 0 and box[3] >= 0


def check_object(
    row: Record, size: tuple[int, int] | None, points: int, where: object, faults: Faults
) -> tuple[Record, list[str]]:
    """Check box, mask and keypoints of an annotation; take the box from the mask if need be.

    Args:
        row: the annotation.
        size: height and width of its image, pixels; None if unknown.
        points: keypoints that each annotation has, 0 for none.
    Returns: the annotation, a copy if it was repaired, and its problems of ``ISSUE_POLICIES``.
    """
    _check_keypoints(row, points, where, faults)
    segmentation = row.get("segmentation")
    has_mask = segmentation is not None and segmentation not in ([], "")
    sound = sound_mask(segmentation, size) if has_mask else None
    problems = []
    if has_mask and sound is None:
        problems = [MALFORMED_MASK]
    elif sound is not segmentation and has_mask:
        row, problems = {**row, "segmentation": sound}, [MALFORMED_PART]
    if is_box(row.get("bbox")):
        return row, problems
    found = None if sound is None or size is None else mask_area_and_box(sound, size)
    if found is None:
        return row, [MALFORMED_BOX, *problems]
    return {**row, "bbox": found[1]}, [BOX_FROM_MASK, *problems]


def mend_area(row: Record, size: tuple[int, int] | None) -> tuple[Record, list[str]]:
    """Replace an area that cannot be that of the object.

    Args:
        row: an annotation with a sound box.
        size: height and width of its image, pixels; None if unknown.
    Returns: as ``check_object``.
    """
    _, _, width, height = row["bbox"]
    area, box_area = row.get("area"), width * height
    if is_number(area) and box_area < 1 and 0 <= area <= AREA_SLACK:
        return row, []
    if is_number(area) and 0 < area <= LARGEST_SHARE_OF_BOX * box_area + AREA_SLACK:
        return row, []
    segmentation = row.get("segmentation")
    found = mask_area_and_box(segmentation, size) if size is not None and segmentation else None
    return {**row, "area": found[0] if found else box_area}, [AREA_REPLACED]


def _check_keypoints(row: Record, points: int, where: object, faults: Faults) -> None:
    values = row.get("keypoints")
    if values is None or values == []:
        return
    if not points:
        faults.add("objects with keypoints of a category that names none", where)
        return
    found = numbers(values, 3 * points)
    if found is None or not {0.0, 1.0, 2.0}.issuperset(found[2::3]):
        faults.add("objects with malformed keypoints", f"{where}: {shown(values)}")
