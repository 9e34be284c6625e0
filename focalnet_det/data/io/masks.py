"""Validate instance masks, and convert them to the formats of Detectron2's transforms."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from ..issue_policies import EMPTY_MASK, MALFORMED_MASK, MALFORMED_PART, NO_MASK

# Pixels. pycocotools allocates 5 points of about 24 bytes per pixel of an outline: 240 MB.
MAX_OUTLINE = 2_000_000
# Polygons with fewer numbers cannot have a too long outline inside the margin.
SHORT_POLYGON = 64
PLAIN_NUMBERS = frozenset((int, float))
# Five-bit groups per number of compressed RLE; enough for runs of 2**50 pixels.
MAX_RLE_GROUPS = 10


def clean_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Any, str | None]:
    """Validate a mask, and convert it to a format of Detectron2's transforms.

    Args:
        segmentation: polygons (lists of x, y, x, y, ..., absolute pixels), compressed or
            uncompressed RLE, or an array (H, W) that is nonzero inside the mask.
        size: height and width of the image, pixels.
    Returns: polygons or compressed RLE, None if the mask is dropped; and its issue, or None.
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
    polygons = valid_polygons(parts, size)
    if not polygons:
        return None, MALFORMED_MASK
    if not np.any(mask_utils.area(mask_utils.frPyObjects(polygons, *size))):
        return None, EMPTY_MASK
    return polygons, None if len(polygons) == len(parts) else MALFORMED_PART


def valid_polygons(parts: Sequence[Any], size: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Return the well-formed polygons of a mask; none if their total outline is too long."""
    polygons = [polygon for part in parts if (polygon := as_polygon(part, size)) is not None]
    longest = min(MAX_OUTLINE, 4 * size[0] * size[1] + 1000)
    numbers = sum(map(len, polygons))
    if numbers > SHORT_POLYGON and sum(map(outline_length, polygons)) > longest:
        return []
    return polygons


def outline_length(polygon: NDArray[np.float64]) -> float:
    """Return the length of a closed outline in pixels, by the maximum norm."""
    xy = polygon.reshape(-1, 2)
    return float(np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum())


def as_polygon(part: Any, size: tuple[int, int]) -> NDArray[np.float64] | None:
    """Return a polygon as a new array (2 N,) of x, y, x, y, ...; None if malformed."""
    if isinstance(part, np.ndarray):
        part = part.reshape(-1).tolist()
    # As floats: Detectron2 truncates when it resizes integer polygons.
    return np.array(part, dtype=np.float64) if is_polygon(part, size) else None


def is_polygon(part: Any, size: tuple[int, int]) -> bool:
    """Return whether a list is x, y, x, y, ... of three or more points not far from the image.

    Optimized for speed, since files contain millions of polygons.
    """
    if not isinstance(part, list | tuple) or not has_enough_points(part):
        return False
    if not PLAIN_NUMBERS.issuperset(map(type, part)):
        return False
    # Time and memory of pycocotools grow with the outline, without bound.
    margin = max(size)
    xs, ys = part[::2], part[1::2]
    inside = min(xs) >= -margin and max(xs) <= size[1] + margin
    inside = inside and min(ys) >= -margin and max(ys) <= size[0] + margin
    # NaN passes these comparisons, but propagates to the sum.
    return inside and not math.isnan(sum(part))


def has_enough_points(polygon: Any) -> bool:
    """Return whether a polygon has three or more points, and a y for every x."""
    return len(polygon) % 2 == 0 and len(polygon) >= 6


def clean_rle(
    rle: Mapping[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any] | None, str | None]:
    """Validate and compress a run-length encoded mask; see ``clean_segmentation``."""
    runs = valid_runs(rle, size)
    if runs is None:
        return None, MALFORMED_MASK
    if not runs[1::2].any():
        return None, EMPTY_MASK
    return mask_utils.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size), None


def valid_runs(rle: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.int64] | None:
    """Return the run lengths of an RLE, (N,); None if it does not exactly fill the image."""
    try:
        runs = run_lengths(rle["counts"])
        same_size = tuple(rle["size"]) == size
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    # pycocotools leaves memory uninitialized if the runs do not fill the image.
    if not same_size or not runs.size or runs.min() < 0 or runs.max() > size[0] * size[1]:
        return None
    return runs if runs.sum() == size[0] * size[1] else None


def run_lengths(counts: Any) -> NDArray[np.int64]:
    """Decode the alternating run lengths of background and mask from either form of RLE.

    Compressed RLE stores runs, from the fourth on as differences to the run two before, as signed
    little-endian numbers of five-bit groups. Each character minus 48 is a group plus a sixth bit
    that is set if another group follows. The highest bit of the last group is the sign.

    Returns: (N,), pixels.
    Raises: TypeError, ValueError or OverflowError if it is malformed.
    Source: cocodataset/cocoapi:common/maskApi.c (rleFrString).
    """
    if not isinstance(counts, str | bytes):
        runs = np.asarray(counts, dtype=np.int64)
        if runs.ndim != 1 or any(int(run) != run for run in counts):
            raise ValueError("RLE run lengths must be integers.")
        return runs
    data = counts.encode() if isinstance(counts, str) else counts
    groups = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if ((groups < 0) | (groups >= 64)).any():
        raise ValueError("Invalid character in compressed RLE.")
    return _runs_of_groups(groups)


def _runs_of_groups(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Decode the run lengths of the six-bit groups of compressed RLE, (N,), 0..63 each."""
    last = np.flatnonzero((groups & 32) == 0)
    if not groups.size:
        return groups
    if not last.size or last[-1] != groups.size - 1:
        raise ValueError("Compressed RLE ends within a number.")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > MAX_RLE_GROUPS:
        raise ValueError("RLE run length exceeds any image size.")
    shifts = 5 * (np.arange(groups.size) - np.repeat(first, lengths))
    values = np.add.reduceat((groups & 31) << shifts, first)
    values -= np.where(groups[last] & 16, np.int64(1) << (5 * lengths), 0)
    runs = values.copy()
    # From the fourth on, each is relative to the one two before.
    runs[1::2], runs[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return runs


def valid_part(segmentation: Any, size: tuple[int, int] | None) -> Any:
    """Return the well-formed part of a mask in a JSON file, or the object itself if all of it is.

    Args:
        segmentation: polygons or RLE.
        size: height and width of the image, pixels; None if unknown, which leaves polygons
            unbounded and takes the size of RLE from itself.
    Returns: polygons or RLE as in the file, None if nothing is well-formed.
    """
    if isinstance(segmentation, dict):
        rle_size = segmentation.get("size")
        if size is None and isinstance(rle_size, list) and len(rle_size) == 2:
            size = (rle_size[0], rle_size[1])
        return segmentation if size and valid_runs(segmentation, size) is not None else None
    if not isinstance(segmentation, list):
        return None
    bounds = size or (MAX_OUTLINE, MAX_OUTLINE)
    polygons = [part for part in segmentation if is_polygon(part, bounds)]
    if not polygons:
        return None
    if sum(map(len, polygons)) > SHORT_POLYGON and not valid_polygons(polygons, bounds):
        return None
    return segmentation if len(polygons) == len(segmentation) else polygons


def mask_area_and_box(segmentation: Any, size: tuple[int, int]) -> tuple[float, list[float]] | None:
    """Measure a mask: area and bounding box.

    As in COCO, the box of polygons is that of their points.

    Args:
        segmentation: polygons or RLE.
        size: height and width of the image, pixels.
    Returns: area, pixels, and box, xywh, absolute pixels; None if the mask is empty or malformed.
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
