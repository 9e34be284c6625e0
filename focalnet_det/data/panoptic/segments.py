"""Read COCO panoptic files: a JSON of segments, and PNGs whose colors are segment ids."""

import errno
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from numpy.typing import NDArray

from ..io.labels import IGNORE, UnreadableLabelsError
from ..io.open_image import open_image
from ..io.panoptic_rows import VOID, read_panoptic_rows
from ..shapes.export import mask_box

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PanopticFile:
    """Contents of a validated panoptic JSON.

    Attributes:
        path: the file.
        images: by id.
        annotations: by image id, each with "file_name" of its PNG and "segments_info".
        categories: by id, in order of id.
    """

    path: Path
    images: Mapping[int, Record]
    annotations: Mapping[int, Record]
    categories: Mapping[int, Record]

    def names(self, *, things: bool) -> dict[int, str]:
        """Return category id -> name of the things or of the stuff, in order of id."""
        return {k: c["name"] for k, c in self.categories.items() if bool(c["isthing"]) == things}


def read_panoptic_json(path: str | Path) -> PanopticFile:
    """Read and validate a panoptic JSON.

    Raises: FileNotFoundError if it does not exist, DataError with all errors.
    """
    path = Path(path)
    images, annotations, categories = read_panoptic_rows(path)
    return PanopticFile(path=path, images=images, annotations=annotations, categories=categories)


def category_problems(categories: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Yield (problem, category) for duplicate and contradictory categories."""
    for key in ("id", "name"):
        kinds: dict[Any, set[bool]] = {}
        for category in categories:
            kinds.setdefault(category[key], set()).add(bool(category["isthing"]))
        counts = Counter(category[key] for category in categories)
        for value, found in kinds.items():
            if len(found) == 2:
                yield "categories that are both thing and stuff", f"{key} {value}"
            elif counts[value] > 1:
                yield "duplicate categories", f"{key} {value}"
    if not categories:
        yield "missing categories", "the list is empty"


def read_segment_ids(path: str | Path) -> NDArray[np.int32]:
    """Read the segment ids of a panoptic PNG: R + 256 G + 65536 B, 0 for void.

    Returns: (H, W).
    Raises: FileNotFoundError if it does not exist, UnreadableLabelsError if it is damaged or not
        RGB.
    Source: cocodataset/panopticapi:panopticapi/utils.py (rgb2id).
    """
    try:
        with open_image(path) as image:
            image.load()
            mode, colors = image.mode, np.array(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such panoptic PNG", str(path)) from error
    except (MemoryError, IsADirectoryError, PermissionError):
        raise
    # Pillow raises many exception types on damaged files.
    except Exception as error:
        raise UnreadableLabelsError(f"Cannot read panoptic PNG {path}: {error}.") from error
    if mode != "RGB":
        raise UnreadableLabelsError(
            f"Panoptic PNG {path} is an image of mode {mode}, but segment ids are RGB colors."
        )
    red, green, blue = (colors[..., channel].astype(np.int32) for channel in range(3))
    ids: NDArray[np.int32] = red + 256 * green + 65536 * blue
    return ids


def segment_colors(ids: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Encode segment ids, (H, W), as RGB colors, (H, W, 3)."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def segment_problems(
    pixels: Mapping[int, int], segments: Sequence[Record], categories: Container[int]
) -> Iterator[tuple[str, str]]:
    """Yield (problem, detail) for each disagreement between a list of segments and an id map.

    Args:
        pixels: id -> number of pixels, see :func:`segment_pixels`.
        segments: dicts with "id" and "category_id".
        categories: known category ids.
    """
    counts = Counter(segment["id"] for segment in segments)
    for segment_id, count in counts.items():
        if segment_id == VOID:
            yield "segments with id 0", "id 0"
        elif count > 1:
            yield "duplicate segment ids", f"id {segment_id}, {count} times"
        elif segment_id not in pixels:
            yield "segments without pixels", f"id {segment_id}"
    for segment in segments:
        if segment["category_id"] not in categories:
            yield "segments with an unknown category", f"category {segment['category_id']}"
    for segment_id in pixels:
        if segment_id not in counts:
            yield "pixels of an unlisted segment", f"id {segment_id}, {pixels[segment_id]} pixels"


def segment_pixels(ids: NDArray[np.integer]) -> dict[int, int]:
    """Count the pixels of each id of a map, (H, W), except 0."""
    unique, counts = np.unique(ids, return_counts=True)
    return {int(i): int(n) for i, n in zip(unique, counts, strict=True) if i != VOID}


@dataclass(frozen=True)
class SegmentLabels:
    """Reader of semantic labels from one panoptic PNG.

    Attributes:
        classes: segment id -> class; other pixels are ignored.
    """

    classes: Mapping[int, int]

    def read(self, path: str | Path) -> NDArray[np.int64]:
        """Read classes, (H, W), 255 for ignored pixels; raises as ``read_segment_ids``."""
        return self.map_ids(read_segment_ids(path))

    def map_ids(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Map segment ids, (H, W), to classes, (H, W)."""
        known = np.array(sorted(self.classes), dtype=np.int64)
        values = np.array([*(self.classes[int(k)] for k in known), IGNORE], dtype=np.int64)
        if not known.size:
            return np.full(ids.shape, IGNORE, dtype=np.int64)
        index = np.searchsorted(known, ids).clip(max=len(known) - 1)
        labels: NDArray[np.int64] = values[np.where(known[index] == ids, index, len(known))]
        return labels


def all_listed(ids: NDArray[np.int32], segments: Sequence[Record]) -> bool:
    """Return whether each pixel, (H, W), is void or belongs to a listed segment."""
    listed = np.zeros(int(ids.max(initial=0)) + 1, dtype=bool)
    listed[VOID] = True
    listed[[s["id"] for s in segments if 0 <= s["id"] < len(listed)]] = True
    return bool(listed[ids].all())


def segment_annotations(ids: NDArray[np.int32], segments: Sequence[Record]) -> list[Record]:
    """Convert the things of panoptic segments to annotations in Detectron2's format.

    Args:
        ids: segment ids, (H, W).
        segments: dicts with "id", "category_id" (the class) and "isthing".
    """
    annotations = []
    for segment in segments:
        if not segment["isthing"]:
            continue
        mask = ids == segment["id"]
        annotations.append(
            {
                "category_id": segment["category_id"],
                "iscrowd": segment.get("iscrowd", 0),
                # The mapper drops and counts annotations with an empty box.
                "bbox": mask_box(mask) if mask.any() else [0, 0, 0, 0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "segmentation": mask,
            }
        )
    return annotations
