"""Turn a prediction into an SVG whose regions show their names and can be clicked."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..visualization.draw_instances import KEYPOINT_THRESHOLD, object_colors
from ..visualization.draw_panoptic import class_name, color
from ..visualization.draw_semantic import palette, present_classes
from ..visualization.label_layout import Color
from ..visualization.objects import predicted_objects
from .prediction import Prediction

# Pixels; outlines deviate at most by this. Longer sides are shrunk for the page.
TOLERANCE, LONGEST_SIDE = 0.7, 1400
# Size of names over the width of the image.
NAME_SHARE = 0.032

STYLE = """
.regions { width: 100%; height: auto; display: block; }
.regions .region path { fill-opacity: 0.3; stroke-width: 2; vector-effect: non-scaling-stroke; }
.regions .region { cursor: pointer; }
.regions .region:hover path, .regions .region.chosen path { fill-opacity: 0.6; }
.regions .region text { opacity: 0; pointer-events: none; paint-order: stroke; fill: #fff;
  stroke: #000; font-family: system-ui, sans-serif; font-weight: 600; text-anchor: middle; }
.regions .region:hover text { opacity: 1; }
"""


@dataclass(frozen=True)
class Region:
    """An object or a class of pixels of an image.

    Attributes:
        name: of its class.
        label: shown while the pointer is over it.
        box: xyxy, pixels of the image.
        outlines: SVG path, pixels of the image.
        color: RGB 0..255.
        points: x and y of its keypoints, pixels of the image.
    """

    name: str
    label: str
    box: tuple[float, float, float, float]
    outlines: str
    color: Color
    points: Sequence[tuple[float, float]] = ()


def regions_of(prediction: Prediction, min_score: float) -> list[Region]:
    """Return what is shown of a prediction, large regions first.

    Panoptic segments if the model predicts them, else instances, else classes of pixels.

    Args:
        prediction: of an image.
        min_score: of instances.
    """
    if "panoptic_seg" in prediction:
        found = list(_segments(prediction))
    elif "instances" in prediction:
        found = list(_instances(prediction, min_score))
    else:
        found = list(_classes(prediction))
    return sorted(found, key=lambda r: -(r.box[2] - r.box[0]) * (r.box[3] - r.box[1]))


def _instances(prediction: Prediction, min_score: float) -> Iterator[Region]:
    instances = prediction.instances
    objects = predicted_objects(instances[instances.scores >= min_score])
    assert objects.scores is not None
    names = prediction.metadata.thing_classes
    colors = object_colors(objects.classes.tolist(), len(names))
    for index, cls in enumerate(objects.classes.tolist()):
        left, top, right, bottom = map(float, objects.boxes[index])
        path = f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}Z"
        # An empty mask could be neither seen nor clicked.
        if objects.masks is not None and objects.masks[index].any():
            path = outlines(objects.masks[index])
        points: list[tuple[float, float]] = []
        if objects.keypoints is not None:
            seen = objects.keypoints[index][:, 2] > KEYPOINT_THRESHOLD
            points = [(float(x), float(y)) for x, y in objects.keypoints[index][seen, :2]]
        label = f"{names[cls]} {objects.scores[index]:.0%}"
        yield Region(names[cls], label, (left, top, right, bottom), path, colors[index], points)


def _segments(prediction: Prediction) -> Iterator[Region]:
    ids, segments = prediction.panoptic
    for segment in segments:
        name = class_name(segment, prediction.metadata)
        mask = ids.numpy() == segment["id"]
        if mask.any():
            score = f" {segment['score']:.0%}" if "score" in segment else ""
            shade = color(segment, prediction.metadata)
            yield Region(name, name + score, mask_box(mask), outlines(mask), shade)


def _classes(prediction: Prediction) -> Iterator[Region]:
    labels, names = prediction.semantic.numpy(), prediction.metadata.stuff_classes
    colors = prediction.metadata.get("stuff_colors") or palette(len(names))
    for cls in present_classes(labels):
        mask = labels == cls
        share = f" {mask.mean():.0%} of the image"
        red, green, blue = colors[cls]
        shade = (red, green, blue)
        yield Region(names[cls], names[cls] + share, mask_box(mask), outlines(mask), shade)


def mask_box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return the box of a mask that is not empty, xyxy, pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def outlines(mask: NDArray[np.bool_]) -> str:
    """Return the outlines of a mask, (H, W), as an SVG path; holes follow the even-odd rule."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parts = []
    for outline in found:
        points = cv2.approxPolyDP(outline, TOLERANCE, closed=True)[:, 0]
        if len(points) < 3:
            points = outline[:, 0]
        # Outlines run through the middles of pixels.
        corners = "L".join(f"{x + 0.5:g} {y + 0.5:g}" for x, y in points)
        parts.append(f"M{corners}Z")
    return "".join(parts)


def render(image: NDArray[np.uint8], regions: Sequence[Region]) -> str:
    """Return an SVG of an image and regions, numbered as given in ``data-index``.

    Args:
        image: uint8 RGB, (H, W, 3).
        regions: see :func:`regions_of`.
    """
    height, width = image.shape[:2]
    size = NAME_SHARE * width
    groups = "".join(_group(i, r, size, (height, width)) for i, r in enumerate(regions))
    return (
        f'<svg class="regions" viewBox="0 0 {width} {height}" '
        f'xmlns="http://www.w3.org/2000/svg"><image width="{width}" height="{height}" '
        f'href="{_data_url(image)}"/>{groups}</svg>'
    )


def _group(index: int, region: Region, size: float, image: tuple[int, int]) -> str:
    left, top, right, _ = region.box
    shade = "#{:02x}{:02x}{:02x}".format(*region.color)
    # Above the region, unless that is outside of the image.
    y = top - 0.3 * size if top > 1.3 * size else top + size
    half = 0.3 * size * len(region.label)
    x = min(max((left + right) / 2, half), max(image[1] - half, half))
    points = "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{size / 5:.1f}" fill="#ffeb3b"/>'
        for px, py in region.points
    )
    return (
        f'<g class="region" data-index="{index}"><title>{escape(region.label)}</title>'
        f'<path d="{region.outlines}" fill="{shade}" stroke="{shade}" fill-rule="evenodd"/>{points}'
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" stroke-width="{size / 6:.1f}">'
        f"{escape(region.label)}</text></g>"
    )


def _data_url(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
