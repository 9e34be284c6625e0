"""Panoptic segments drawn on images, with the names of their classes."""

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
# Names are written on segments of this share of the image and more.
NAMED_SHARE = 0.004
# Of the names, as a share of the image's height.
NAME_SIZE = 0.045


def draw_segments(
    image: NDArray[np.uint8],
    ids: NDArray[np.integer],
    segments: Sequence[Mapping[str, Any]],
    metadata: Metadata,
) -> np.ndarray:
    """Segments as colors over an image, with white outlines and their names; void is darkened.

    The color is the class's, a little brighter or darker for each thing, so that things that touch
    can be told apart.

    Args:
        image: (H, W, 3) RGB.
        ids: (H, W), 0 where there is no segment.
        segments: dicts with "id", "category_id" (class of the model) and "isthing".
    Returns: (h, w, 3) uint8 RGB, enlarged where the image is small.
    """
    scale = max(1.0, MIN_HEIGHT / image.shape[0])
    colors = np.zeros((*ids.shape, 3), dtype=np.float64)
    for segment in segments:
        shade = 1.0
        if segment["isthing"]:
            # The same in every run.
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
            drawer.draw_text(name, inside(mask), font_size=NAME_SIZE * image.shape[0], color="w")
    return drawer.get_output().get_image()


def inside(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """x and y of the pixel of a mask (H, W) that is furthest from its outside."""
    distance = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(x), int(y)


def class_name(segment: Mapping[str, Any], metadata: Metadata) -> str:
    """Name of a segment's class."""
    names = metadata.thing_classes if segment["isthing"] else metadata.stuff_classes
    return str(names[segment["category_id"]])


def color(segment: Mapping[str, Any], metadata: Metadata) -> tuple[int, int, int]:
    """Color of a segment's class, RGB 0..255: the dataset's, or of a palette."""
    kind = "thing" if segment["isthing"] else "stuff"
    found = metadata.get(f"{kind}_colors")
    if found is None:
        things, stuff = len(metadata.thing_classes), len(metadata.stuff_classes)
        shades = palette(things + stuff)
        found = shades[:things] if segment["isthing"] else shades[things:]
    red, green, blue = found[segment["category_id"]]
    return red, green, blue


def draw_truth(record: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """The segments of a record, or its instances where it names no panoptic PNG."""
    if "pan_seg_file_name" not in record:
        return draw_ground_truth(record, metadata)
    ids = read_segment_ids(record["pan_seg_file_name"])
    return draw_segments(read_rgb(record), ids, record["segments_info"], metadata)


def draw_prediction(
    record: dict[str, Any], output: dict[str, Any], metadata: Metadata, min_score: float
) -> np.ndarray:
    """The segments of a model's output, or its instances where it has no panoptic answer."""
    if "panoptic_seg" not in output:
        return draw_output(record, output, metadata, min_score)
    ids, segments = output["panoptic_seg"]
    return draw_segments(read_rgb(record), ids.cpu().numpy(), segments, metadata)


PANOPTIC = Drawings(truth=draw_truth, prediction=draw_prediction)
