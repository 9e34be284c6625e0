"""Instance masks of any kind: which are sound, and as what Detectron2's transforms take them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from ..issue_policies import EMPTY_MASK, MALFORMED_MASK, MALFORMED_PART, NO_MASK

# pycocotools takes 5 points for each pixel of an outline, and about 24 bytes for each point: an
# outline of this many pixels takes 240 MB.
LONGEST_OUTLINE = 2_000_000
# Below this many numbers, a polygon inside the margin cannot have an outline that is too long.
SHORT_POLYGON = 64
PLAIN_NUMBERS = frozenset((int, float))
# Groups of five bits in a number of compressed RLE; runs of up to 2**50 pixels.
MOST_GROUPS = 10


def clean_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Any, str | None]:
    """Return a mask of any kind as Detectron2's transforms take it.

    Args:
        segmentation: polygons (a list of x, y, x, y, ..., absolute pixels), RLE, compressed or not,
            or an array (H, W) that is not 0 inside the mask.
        size: height and width of the image, pixels.
    Returns: polygons or compressed RLE, None if the mask is dropped; and its problem, or None.
    """
    if segmentation is None or (isinstance(segmentation, list) and not segmentation):
        return None, NO_MASK
    if isinstance(segmentation, list):
        return clean_polygons(segmentation, size)
    if isinstance(segmentation, dict):
        return clean_rle(segmentation, size)
    if not isinstance(segmentation, np.ndarray) or segmentation.shape != size:
        return None, MALFORMED_MASK
    if not segmentation.any():
        return None, EMPTY_MASK
    return mask_utils.encode(np.asfortranarray(segmentation != 0, dtype=np.uint8)), None


def clean_polygons(
    parts: Sequence[Any], size: tuple[int, int]
) -> tuple[list[NDArray[np.float64]] | None, str | None]:
    """Return the well-formed polygons of a mask; see ``clean_segmentation``."""
    polygons = sound_polygons(parts, size)
    if not polygons:
        return None, MALFORMED_MASK
    if not np.any(mask_utils.area(mask_utils.frPyObjects(polygons, *size))):
        return None, EMPTY_MASK
    return polygons, None if len(polygons) == len(parts) else MALFORMED_PART


def sound_polygons(parts: Sequence[Any], size: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Return the well-formed polygons of a mask; none if their outlines are too long together."""
    polygons = [polygon for part in parts if (polygon := well_formed(part, size)) is not None]
    longest = min(LONGEST_OUTLINE, 4 * size[0] * size[1] + 1000)
    numbers = sum(map(len, polygons))
    if numbers > SHORT_POLYGON and sum(map(outline_length, polygons)) > longest:
        return []
    return polygons


def outline_length(polygon: NDArray[np.float64]) -> float:
    """Return the pixels of a closed outline, the larger of the steps in x and in y for each."""
    xy = polygon.reshape(-1, 2)
    return float(np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum())


def well_formed(part: Any, size: tuple[int, int]) -> NDArray[np.float64] | None:
    """Return a polygon as a new array (2 N,) of x, y, x, y, ...; None if it is malformed."""
    if isinstance(part, np.ndarray):
        part = part.reshape(-1).tolist()
    # As floats: Detectron2 cuts off the decimals when it resizes polygons of integers.
    return np.array(part, dtype=np.float64) if is_polygon(part, size) else None


def is_polygon(part: Any, size: tuple[int, int]) -> bool:
    """Return whether a list holds x, y, x, y, ... of three points or more, not far from the image.

    Written for speed: files hold millions of polygons.
    """
    if not isinstance(part, list | tuple) or not enough_coordinates(part):
        return False
    if not PLAIN_NUMBERS.issuperset(map(type, part)):
        return False
    # The time and memory that pycocotools takes grow with the outline, without limit.
    margin = max(size)
    xs, ys = part[::2], part[1::2]
    inside = min(xs) >= -margin and max(xs) <= size[1] + margin
    inside = inside and min(ys) >= -margin and max(ys) <= size[0] + margin
    # NaN compares with nothing, and is in the sum.
    return inside and not math.isnan(sum(part))


def enough_coordinates(polygon: Any) -> bool:
    """Return whether a polygon has three points or more, and y for every x."""
    return len(polygon) % 2 == 0 and len(polygon) >= 6


def clean_rle(
    rle: Mapping[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any] | None, str | None]:
    """Return a run-length encoded mask, compressed; see ``clean_segmentation``."""
    runs = sound_runs(rle, size)
    if runs is None:
        return None, MALFORMED_MASK
    if not runs[1::2].any():
        return None, EMPTY_MASK
    return mask_utils.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size), None


def sound_runs(rle: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.int64] | None:
    """Return the run lengths of an RLE that fills an image of a size; None if it does not."""
    try:
        runs = run_lengths(rle["counts"])
        same_size = tuple(rle["size"]) == size
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    # pycocotools decodes runs that end early into memory that it did not set.
    if not same_size or not runs.size or runs.min() < 0 or runs.max() > size[0] * size[1]:
        return None
    return runs if runs.sum() == size[0] * size[1] else None


def run_lengths(counts: Any) -> NDArray[np.int64]:
    """Return the lengths of the runs outside, inside, outside, ... a mask, from either RLE.

    The compressed kind holds differences to the run before the last, from the fourth run on, in
    groups of five bits, lowest first; each character, less 48, is a group and a sixth bit that says
    whether another follows. The highest bit of the last group is the sign.

    Raises: TypeError, ValueError or OverflowError if it is neither.
    Source: cocodataset/cocoapi:common/maskApi.c (rleFrString).
    """
    if not isinstance(counts, str | bytes):
        runs = np.asarray(counts, dtype=np.int64)
        if runs.ndim != 1 or any(int(run) != run for run in counts):
            raise ValueError("A run of a fraction of a pixel.")
        return runs
    data = counts.encode() if isinstance(counts, str) else counts
    groups = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if ((groups < 0) | (groups >= 64)).any():
        raise ValueError("A character that compressed RLE does not have.")
    return _runs_of_groups(groups)


def _runs_of_groups(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the run lengths of the groups of compressed RLE, (N,), 0..63 each."""
    last = np.flatnonzero((groups & 32) == 0)
    if not groups.size:
        return groups
    if not last.size or last[-1] != groups.size - 1:
        raise ValueError("Compressed RLE that ends within a number.")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > MOST_GROUPS:
        raise ValueError("A run that no image is large enough for.")
    shifts = 5 * (np.arange(groups.size) - np.repeat(first, lengths))
    values = np.add.reduceat((groups & 31) << shifts, first)
    values -= np.where(groups[last] & 16, np.int64(1) << (5 * lengths), 0)
    runs = values.copy()
    # Each but the first three is relative to the one before the last.
    runs[1::2], runs[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return runs


def sound_mask(segmentation: Any, size: tuple[int, int] | None) -> Any:
    """Return the well-formed part of a mask of a JSON file, the mask itself if all of it is.

    Args:
        size: height and width of the image, pixels; None if unknown: polygons are then held to no
            bounds, and RLE to its own size.
    Returns: polygons or RLE as in the file, None if nothing is well-formed.
    """
    if isinstance(segmentation, dict):
        own = segmentation.get("size")
        if size is None and isinstance(own, list) and len(own) == 2:
            size = (own[0], own[1])
        return segmentation if size and sound_runs(segmentation, size) is not None else None
    if not isinstance(segmentation, list):
        return None
    bounds = size or (LONGEST_OUTLINE, LONGEST_OUTLINE)
    kept = [part for part in segmentation if is_polygon(part, bounds)]
    if not kept:
        return None
    if sum(map(len, kept)) > SHORT_POLYGON and not sound_polygons(kept, bounds):
        return None
    return segmentation if len(kept) == len(segmentation) else kept


def mask_area_and_box(segmentation: Any, size: tuple[int, int]) -> tuple[float, list[float]] | None:
    """Return area, pixels, and box, xywh, of a sound mask; None if it has no pixel or is malformed.

    The box of polygons is that of their points, as COCO's is.
    """
    mask, _ = clean_segmentation(segmentation, size)
    if mask is None:
        return None
    if isinstance(mask, dict):
        return float(mask_utils.area(mask)), [float(v) for v in mask_utils.toBbox(mask)]
    merged = mask_utils.merge(mask_utils.frPyObjects(mask, *size))
    points = np.concatenate(mask).reshape(-1, 2).clip(0, size[::-1])
    low, high = points.min(axis=0), points.max(axis=0)
    return float(mask_utils.area(merged)), [*low.tolist(), *(high - low).tolist()]
