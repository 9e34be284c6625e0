"""COCO panoptic files: a JSON of segments, and PNGs whose colours are the segments' ids."""

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
from ..io.open_image import open_picture
from ..io.panoptic_rows import VOID, read_panoptic_rows
from ..shapes.export import mask_box

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PanopticFile:
    """What a panoptic JSON says.

    Attributes:
        images: by id.
        annotations: by image id, each with "file_name" of its PNG and "segments_info".
        categories: by id, in order of id.
    """

    path: Path
    images: Mapping[int, Record]
    annotations: Mapping[int, Record]
    categories: Mapping[int, Record]

    def names(self, *, things: bool) -> dict[int, str]:
        """Category id -> name of the things, or of the stuff, in order of id."""
        return {k: c["name"] for k, c in self.categories.items() if bool(c["isthing"]) == things}


def read_panoptic_json(path: str | Path) -> PanopticFile:
    """Read a panoptic JSON, and check every row.

    Raises: FileNotFoundError if there is none, DataError with all faults.
    """
    path = Path(path)
    images, annotations, categories = read_panoptic_rows(path)
    return PanopticFile(path=path, images=images, annotations=annotations, categories=categories)


def category_problems(categories: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """(problem, category) for every category that is listed twice, or as thing and as stuff."""
    for key in ("id", "name"):
        kinds: dict[Any, set[bool]] = {}
        for category in categories:
            kinds.setdefault(category[key], set()).add(bool(category["isthing"]))
        counts = Counter(category[key] for category in categories)
        for value, found in kinds.items():
            if len(found) == 2:
                yield "categories that are thing and stuff", f"{key} {value}"
            elif counts[value] > 1:
                yield "categories listed twice", f"{key} {value}"
    if not categories:
        yield "categories missing", "the list is empty"


def read_segment_ids(path: str | Path) -> NDArray[np.int32]:
    """Segment ids of a panoptic PNG, (H, W): R + 256 G + 65536 B, 0 where there is none.

    Raises: FileNotFoundError if there is no such file, UnreadableLabelsError if it is damaged or
        not in RGB.
    """
    try:
        with open_picture(path) as image:
            image.load()
            mode, colors = image.mode, np.array(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "No such file of panoptic segments", str(path)
        ) from error
    except (MemoryError, IsADirectoryError, PermissionError):
        raise
    # Pillow's decoders meet damage with many kinds of error.
    except Exception as error:
        raise UnreadableLabelsError(f"Cannot read panoptic file {path}: {error}.") from error
    if mode != "RGB":
        raise UnreadableLabelsError(
            f"Panoptic file {path} is a picture of mode {mode}: segment ids are RGB colours."
        )
    red, green, blue = (colors[..., channel].astype(np.int32) for channel in range(3))
    ids: NDArray[np.int32] = red + 256 * green + 65536 * blue
    return ids


def segment_colors(ids: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The picture of segment ids, (H, W) -> (H, W, 3) RGB."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def segment_problems(
    pixels: Mapping[int, int], segments: Sequence[Record], categories: Container[int]
) -> Iterator[tuple[str, str]]:
    """(problem, detail) for every way in which a list of segments and a map of ids disagree.

    Args:
        pixels: of each id in the map, see :func:`segment_pixels`.
        segments: dicts with "id" and "category_id".
        categories: known ones.
    """
    counts = Counter(segment["id"] for segment in segments)
    for segment_id, count in counts.items():
        if segment_id == VOID:
            yield "segments with the id of void", "id 0"
        elif count > 1:
            yield "segment ids that repeat", f"id {segment_id}, {count} times"
        elif segment_id not in pixels:
            yield "segments without pixels", f"id {segment_id}"
    for segment in segments:
        if segment["category_id"] not in categories:
            yield "segments of no category", f"category {segment['category_id']}"
    for segment_id in pixels:
        if segment_id not in counts:
            yield "pixels of no listed segment", f"id {segment_id}, {pixels[segment_id]} pixels"


def segment_pixels(ids: NDArray[np.integer]) -> dict[int, int]:
    """Pixels of each id of a map but 0."""
    found, counts = np.unique(ids, return_counts=True)
    return {int(i): int(n) for i, n in zip(found, counts, strict=True) if i != VOID}


@dataclass(frozen=True)
class SegmentLabels:
    """Semantic labels of one panoptic PNG, by segment.

    Attributes:
        classes: segment id -> class; other pixels are of none.
    """

    classes: Mapping[int, int]

    def read(self, path: str | Path) -> NDArray[np.int64]:
        """Classes (H, W), 255 where there is none; errors as in ``read_segment_ids``."""
        return self.of(read_segment_ids(path))

    def of(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Segment ids -> classes."""
        known = np.array(sorted(self.classes), dtype=np.int64)
        values = np.array([*(self.classes[int(k)] for k in known), IGNORE], dtype=np.int64)
        if not known.size:
            return np.full(ids.shape, IGNORE, dtype=np.int64)
        found = np.searchsorted(known, ids).clip(max=len(known) - 1)
        labels: NDArray[np.int64] = values[np.where(known[found] == ids, found, len(known))]
        return labels


def all_listed(ids: NDArray[np.int32], segments: Sequence[Record]) -> bool:
    """Return whether every pixel, (H, W), has the id of a listed segment, or of void."""
    listed = np.zeros(int(ids.max(initial=0)) + 1, dtype=bool)
    listed[VOID] = True
    listed[[s["id"] for s in segments if 0 <= s["id"] < len(listed)]] = True
    return bool(listed[ids].all())


def segment_annotations(ids: NDArray[np.int32], segments: Sequence[Record]) -> list[Record]:
    """Return instances of the things of panoptic segments, in Detectron2's format.

    Args:
        ids: of the segments, (H, W).
        segments: with "id", "category_id" (the class) and "isthing".
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
                # An empty box has the annotation dropped, and counted.
                "bbox": mask_box(mask) if mask.any() else [0, 0, 0, 0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "segmentation": mask,
            }
        )
    return annotations
