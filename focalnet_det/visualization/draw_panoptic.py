"""Draw panoptic segments with class names on images."""

import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from numpy.typing import NDArray

from ..data.io.panoptic_rows import VOID
from ..data.panoptic.segments import read_segment_ids
from .draw_instances import DASH, MARK, compare_instances, read_rgb
from .draw_semantic import palette
from .label_layout import Color, Label, draw_labels
from .sheet import Picture, Row, enlarged, nearest, panel_width

OPACITY = 0.6
# IoU above which segments of one class are one segment, and part of a predicted segment in void
# or a crowd from which it is not counted (arXiv:1801.00868, section 4.1).
MATCH_IOU = 0.5


def draw_segments(
    image: Picture,
    ids: NDArray[np.integer],
    segments: Sequence[Mapping[str, Any]],
    metadata: Metadata,
    *,
    width: int | None = None,
    marked: Collection[int] = (),
    mark: str = "",
) -> Picture:
    """Draw segments as colors over an image, with white outlines and names; void is darkened.

    The color of a class is slightly varied for each thing, to distinguish touching instances.
    Names of regions stand inside them, those of small things beside them where there is place.

    Args:
        image: uint8 RGB, (H, W, 3).
        ids: segment ids, (H, W), 0 for void.
        segments: dicts with "id", "category_id" (class of the model) and "isthing".
        metadata: of the dataset.
        width: of the result, pixels; None enlarges small images only.
        marked: ids of segments to outline with dashes and to name first.
        mark: first word of their names.
    Returns: uint8 RGB, (h, w, 3); small images are enlarged.
    """
    picture = enlarged(image, width)
    scaled = nearest(ids, (picture.shape[0], picture.shape[1]))
    colors = np.zeros((*scaled.shape, 3))
    labels = []
    for segment in segments:
        mask, shade = scaled == segment["id"], _shade(segment, metadata)
        colors[mask] = shade
        chosen, region = segment["id"] in marked, not segment["isthing"]
        name = class_name(segment, metadata)
        text = f"{mark} {name}" if chosen and mark else name
        labels.append(Label(text=text, mask=mask, color=shade, urgent=chosen, inside=region))
    mixed = (picture * (1 - OPACITY) + colors * OPACITY).astype(np.uint8)
    mixed[_edges(scaled)] = 255
    for segment_id in marked:
        _draw_dashes(mixed, scaled == segment_id)
    return draw_labels(mixed, labels)


def _draw_dashes(picture: Picture, mask: NDArray[np.bool_]) -> None:
    """Outline a mask, (H, W), with dashes, in place."""
    rows, columns = np.nonzero(_edges(mask.astype(np.uint8)))
    dashes = (rows + columns) // DASH % 2 == 0
    picture[rows, columns] = np.where(dashes[:, None], MARK, 255)


def _edges(ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    kernel = np.ones((3, 3), np.uint8)
    gradient = cv2.morphologyEx(ids.astype(np.float32), cv2.MORPH_GRADIENT, kernel)
    return np.asarray(gradient > 0)


def _shade(segment: Mapping[str, Any], metadata: Metadata) -> Color:
    shade = 1.0
    if segment["isthing"]:
        # A checksum instead of a random number keeps colors reproducible.
        shade = 0.75 + 0.5 * (zlib.crc32(str(segment["id"]).encode()) % 100) / 100
    red, green, blue = (min(round(c * shade), 255) for c in color(segment, metadata))
    return red, green, blue


def class_name(segment: Mapping[str, Any], metadata: Metadata) -> str:
    """Return the class name of a segment."""
    names = metadata.thing_classes if segment["isthing"] else metadata.stuff_classes
    return str(names[segment["category_id"]])


def color(segment: Mapping[str, Any], metadata: Metadata) -> Color:
    """Return the class color of a segment, RGB 0..255, from the metadata or a default palette."""
    kind = "thing" if segment["isthing"] else "stuff"
    colors = metadata.get(f"{kind}_colors")
    if colors is None:
        things, stuff = len(metadata.thing_classes), len(metadata.stuff_classes)
        all_colors = palette(things + stuff)
        colors = all_colors[:things] if segment["isthing"] else all_colors[things:]
    red, green, blue = colors[segment["category_id"]]
    return red, green, blue


def segments_without_partner(
    truth: tuple[NDArray[np.integer], Sequence[Mapping[str, Any]]],
    predicted: tuple[NDArray[np.integer], Sequence[Mapping[str, Any]]],
) -> tuple[set[int], set[int]]:
    """Find missed and false segments as panoptic quality counts them.

    Args:
        truth, predicted: segment ids, (H, W), 0 for void, and dicts with "id", "category_id",
            "isthing" and, for crowds, "iscrowd".
    Returns: ids of missed and of false segments.
    Source: cocodataset/panopticapi:panopticapi/evaluation.py.
    """
    pairs, counts = np.unique(
        np.stack([truth[0], predicted[0]], -1).reshape(-1, 2), False, False, True, axis=0
    )
    shared = {(int(t), int(p)): int(n) for (t, p), n in zip(pairs, counts, strict=True)}
    areas: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for pair, count in shared.items():
        for side, segment_id in enumerate(pair):
            areas[side][segment_id] = areas[side].get(segment_id, 0) + count
    by_id = [{int(s["id"]): s for s in segments} for _, segments in (truth, predicted)]
    crowds = {i for i, s in by_id[0].items() if s.get("iscrowd")}
    missed = {i for i in by_id[0] if i not in crowds and i in areas[0]}
    false = {i for i in by_id[1] if i in areas[1]}
    for (t, p), count in shared.items():
        if t in missed and p in false and _kind(by_id[0][t]) == _kind(by_id[1][p]):
            union = areas[0][t] + areas[1][p] - count - shared.get((VOID, p), 0)
            if count > MATCH_IOU * union:
                missed.discard(t)
                false.discard(p)
    for p in set(false):
        same = [t for t in crowds if _kind(by_id[0][t]) == _kind(by_id[1][p])]
        ignored = sum(shared.get((t, p), 0) for t in (VOID, *same))
        if ignored > MATCH_IOU * areas[1][p]:
            false.discard(p)
    return missed, false


def _kind(segment: Mapping[str, Any]) -> tuple[bool, int]:
    return bool(segment["isthing"]), int(segment["category_id"])


def compare_panoptic(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
) -> Row:
    """Draw image, true and predicted segments; missed and false ones have dashed outlines.

    Instances are compared if the record has no panoptic PNG, or the output no segments.

    Args:
        record: in Detectron2's format.
        output: of a model, with "panoptic_seg" at the image's size.
        metadata: of the dataset.
        min_score: of instances.
    """
    if "pan_seg_file_name" not in record or "panoptic_seg" not in output:
        return compare_instances(record, output, metadata, min_score)
    image, width = read_rgb(record), panel_width(3)
    true_ids, true_segments = read_segment_ids(record["pan_seg_file_name"]), record["segments_info"]
    ids, segments = output["panoptic_seg"][0].cpu().numpy(), output["panoptic_seg"][1]
    missed, false = segments_without_partner((true_ids, true_segments), (ids, segments))
    left = draw_segments(
        image, true_ids, true_segments, metadata, width=width, marked=missed, mark="missed"
    )
    right = draw_segments(image, ids, segments, metadata, width=width, marked=false, mark="false")
    shown = {class_name(s, metadata): color(s, metadata) for s in (*true_segments, *segments)}
    panels = [
        (Path(record["file_name"]).name, image),
        (f"ground truth: {len(true_segments)}{_count(missed, 'missed')}", left),
        (f"prediction: {len(segments)}{_count(false, 'false')}", right),
    ]
    return Row(panels=panels, legend=sorted(shown.items()))


def _count(ids: Collection[int], word: str) -> str:
    return f", {len(ids)} {word} (dashed)" if ids else ""
