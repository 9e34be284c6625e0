"""Draw panoptic segments with class names on images."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.utils.visualizer import ColorMode, Visualizer
from numpy.typing import NDArray

from ..data.panoptic.segments import read_segment_ids
from .draw_instances import MIN_HEIGHT, Drawings, draw_ground_truth, draw_output, read_rgb
from .draw_semantic import palette

OPACITY = 0.6
# Least area of segments that are labeled with their class, as a fraction of the image.
NAMED_SHARE = 0.004
# Font size, as a fraction of the image height.
NAME_SIZE = 0.045


def draw_segments(
    image: NDArray[np.uint8],
    ids: NDArray[np.integer],
    segments: Sequence[Mapping[str, Any]],
    metadata: Metadata,
) -> np.ndarray:
    """Draw segments as colors over an image, with white outlines and names; void is darkened.

    The color of a class is slightly varied for each thing, to distinguish touching instances.

    Args:
        image: uint8 RGB, (H, W, 3).
        ids: segment ids, (H, W), 0 for void.
        segments: dicts with "id", "category_id" (class of the model) and "isthing".
        metadata: of the dataset.
    Returns: uint8 RGB, (h, w, 3); small images are enlarged.
    """
    scale = max(1.0, MIN_HEIGHT / image.shape[0])
    colors = np.zeros((*ids.shape, 3), dtype=np.float64)
    for segment in segments:
        shade = 1.0
        if segment["isthing"]:
            # A checksum instead of a random number keeps colors reproducible.
            shade = 0.75 + 0.5 * (zlib.crc32(str(segment["id"]).encode()) % 100) / 100
        colors[ids == segment["id"]] = np.clip(np.multiply(color(segment, metadata), shade), 0, 255)
    mixed = image * (1 - OPACITY) + colors * OPACITY
    edges = cv2.morphologyEx(ids.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    mixed[edges > 0] = 255
    drawer = Visualizer(
        mixed.astype(np.uint8), metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION
    )
    for segment in segments:
        mask = ids == segment["id"]
        if mask.mean() >= NAMED_SHARE:
            name = class_name(segment, metadata)
            size = NAME_SIZE * image.shape[0]
            drawer.draw_text(name, interior_point(mask), font_size=size, color="w")
    return drawer.get_output().get_image()


def interior_point(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return x and y of the pixel of a mask, (H, W), that is farthest from its outside."""
    distance = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(x), int(y)


def class_name(segment: Mapping[str, Any], metadata: Metadata) -> str:
    """Return the class name of a segment."""
    names = metadata.thing_classes if segment["isthing"] else metadata.stuff_classes
    return str(names[segment["category_id"]])


def color(segment: Mapping[str, Any], metadata: Metadata) -> tuple[int, int, int]:
    """Return the class color of a segment, RGB 0..255, from the metadata or a default palette."""
    kind = "thing" if segment["isthing"] else "stuff"
    colors = metadata.get(f"{kind}_colors")
    if colors is None:
        things, stuff = len(metadata.thing_classes), len(metadata.stuff_classes)
        all_colors = palette(things + stuff)
        colors = all_colors[:things] if segment["isthing"] else all_colors[things:]
    red, green, blue = colors[segment["category_id"]]
    return red, green, blue


def draw_truth(record: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """Draw the panoptic segments of a record, or its instances if it has no panoptic PNG."""
    if "pan_seg_file_name" not in record:
        return draw_ground_truth(record, metadata)
    ids = read_segment_ids(record["pan_seg_file_name"])
    return draw_segments(read_rgb(record), ids, record["segments_info"], metadata)


def draw_prediction(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
) -> np.ndarray:
    """Draw the panoptic segments of a model output, or its instances if it has none."""
    if "panoptic_seg" not in output:
        return draw_output(record, output, metadata, min_score)
    ids, segments = output["panoptic_seg"]
    return draw_segments(read_rgb(record), ids.cpu().numpy(), segments, metadata)


PANOPTIC = Drawings(truth=draw_truth, prediction=draw_prediction)
