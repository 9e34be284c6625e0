"""Draw the scenes of the generated dataset `shapes`: outlines, placement and painting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from focalnet_det.data.shapes.textures import (
    STUFF_TEXTURES,
    Array,
    Texture,
    checkerboard,
    dots,
    gradient,
    hue_palette,
    mix,
    plain,
    random_palette,
    smooth_noise,
    speckle,
    stripes,
)

# left, top, right, bottom in integer pixels; right and bottom are exclusive.
Box = tuple[int, int, int, int]

MIN_VISIBLE_SHARE = 0.6
MIN_VISIBLE_PIXELS = 30
SUPERSAMPLING = 4


@dataclass
class Outline:
    """Outline of a shape: closed curves, (N, 2), xy in pixels; `hole` is None for none."""

    outer: Array
    hole: Array | None = None

    @property
    def area(self) -> float:
        """Area in pixels, including parts outside the image."""
        inner = 0.0 if self.hole is None else cv2.contourArea(self.hole)
        return float(cv2.contourArea(self.outer) - inner)


@dataclass
class SceneObject:
    """A thing or a crowd of one class; `full_area` is its area before occlusion, in pixels."""

    class_index: int
    full_area: float
    crowd: bool = False


@dataclass
class Scene:
    """An image and the owner of each pixel.

    Attributes:
        image: (H, W, 3) float32 RGB, 0..1.
        owner: (H, W) int32; 0 = unlabeled, 1..S = stuff class, S+1+i = object i.
        unit: scale of the image, 1.0 for a short side of 192 pixels.
        objects: things and crowds, in order of drawing.
    """

    image: Array
    owner: NDArray[np.int32]
    unit: float
    objects: list[SceneObject] = field(default_factory=list)

    def visible(self, index: int) -> NDArray[np.bool_]:
        """Return the visible mask of object `index`, (H, W)."""
        return np.asarray(self.owner == FIRST_OBJECT + index)


def _arc(count: int, radius: float = 1.0, phase: float = 0.0) -> Array:
    angle = np.arange(count) * (2 * np.pi / count) + phase
    return (radius * np.stack((np.cos(angle), np.sin(angle)), axis=1)).astype(np.float32)


def _circle(_rng: Generator) -> Outline:
    return Outline(_arc(48))


def _square(_rng: Generator) -> Outline:
    return Outline(1.2 * _arc(4, phase=np.pi / 4))


def _triangle(_rng: Generator) -> Outline:
    return Outline(1.25 * _arc(3))


def _star(rng: Generator) -> Outline:
    points = 1.2 * _arc(10)
    points[1::2] *= rng.uniform(0.5, 0.6)
    return Outline(points)


def _ring(rng: Generator) -> Outline:
    return Outline(_arc(48), _arc(48, rng.uniform(0.5, 0.65)))


def _cross(rng: Generator) -> Outline:
    arm = rng.uniform(0.32, 0.42)
    quarter = np.array([(1, -arm), (1, arm), (arm, arm)], dtype=np.float32)
    turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    parts = [quarter @ np.array([(c, s), (-s, c)], dtype=np.float32) for c, s in turns]
    return Outline((1.1 * np.concatenate(parts)).astype(np.float32))


# Each class has its own outline, texture and, by its index, range of hues, so that a small network
# can learn them from scratch in minutes.
CLASSES: dict[str, tuple[Callable[[Generator], Outline], Texture]] = {
    "circle": (_circle, dots),
    "square": (_square, checkerboard),
    "triangle": (_triangle, stripes),
    "star": (_star, gradient),
    "ring": (_ring, speckle),
    "cross": (_cross, plain),
}
THING_CLASSES: tuple[str, ...] = tuple(CLASSES)
STUFF_CLASSES: tuple[str, ...] = tuple(STUFF_TEXTURES)
FIRST_OBJECT = 1 + len(STUFF_CLASSES)


def random_outline(rng: Generator, name: str, center: Array, diameter: float) -> Outline:
    """Sample an outline of a class, rotated by up to 23 degrees and stretched by up to a third.

    Args:
        rng: random generator.
        name: class.
        center: xy, pixels.
        diameter: pixels.
    """
    outline, _ = CLASSES[name]
    template = outline(rng)
    turn, stretch = rng.uniform(-0.4, 0.4), np.sqrt(rng.uniform(0.75, 1.33))
    spin = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    placed = spin * (diameter / 2) * np.array([stretch, 1 / stretch])

    def place(points: Array) -> Array:
        return (points @ placed + center).astype(np.float32)

    return Outline(place(template.outer), None if template.hole is None else place(template.hole))


def coverage(outline: Outline, box: Box) -> Array:
    """Compute the share of each pixel of a window that an outline covers, (height, width), 0..1."""
    left, top, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), dtype=np.uint8)
    curves = [outline.outer] if outline.hole is None else [outline.outer, outline.hole]
    corner = np.array((left, top), dtype=np.float32)
    # Samples are at pixel centers, hence the half; fillPoly takes 4 fractional bits.
    points = [np.round(((c - corner) * SUPERSAMPLING - 0.5) * 16).astype(np.int32) for c in curves]
    cv2.fillPoly(canvas, points, 255, cv2.LINE_8, 4)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / np.float32(255)


def _window(outline: Outline, pad: int, shape: tuple[int, int]) -> Box | None:
    """Return the padded bounding box of an outline, clipped to the image; None if outside."""
    low = np.floor(outline.outer.min(axis=0)).astype(int) - pad
    high = np.ceil(outline.outer.max(axis=0)).astype(int) + pad + 1
    left, top = max(0, int(low[0])), max(0, int(low[1]))
    right, bottom = min(shape[1], int(high[0])), min(shape[0], int(high[1]))
    return (left, top, right, bottom) if right - left > 1 and bottom - top > 1 else None


def _leaves_enough(scene: Scene, owner: NDArray[np.int32], mask: NDArray[np.bool_]) -> bool:
    """Return whether every object that `mask` partly covers remains sufficiently visible."""
    counts = np.bincount(owner[mask], minlength=FIRST_OBJECT)
    for label in np.flatnonzero(counts[FIRST_OBJECT:]) + FIRST_OBJECT:
        item = scene.objects[label - FIRST_OBJECT]
        left = np.count_nonzero(scene.owner == label) - counts[label]
        if left < max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * item.full_area):
            return False
    return True


def _fill(rng: Generator, scene: Scene, class_index: int, shape: tuple[int, int]) -> Array:
    """Sample the texture of a class, often with directional lighting, (H, W, 3), 0..1."""
    _, texture = CLASSES[THING_CLASSES[class_index]]
    hue = (class_index + rng.uniform(-0.45, 0.45)) / len(CLASSES)
    fill = texture(rng, *shape, scene.unit, hue_palette(rng, hue))
    if rng.uniform() < 0.6:
        angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.3)
        y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
        fill = fill * (1 + strength * (np.cos(angle) * x + np.sin(angle) * y))[..., None]
    return np.clip(fill, 0, 1).astype(np.float32)


def _paint(rng: Generator, scene: Scene, class_index: int, alpha: Array, box: Box) -> None:
    """Paint shadow, fill and rim of a shape; `alpha` is its coverage of the window `box`."""
    left, top, right, bottom = box
    patch = scene.image[top:bottom, left:right]
    if rng.uniform() < 0.6:
        dx, dy = rng.uniform(-3, 3, 2) * scene.unit
        move = np.array([(1, 0, dx), (0, 1, dy)], dtype=np.float32)
        shadow = cv2.warpAffine(alpha, move, (right - left, bottom - top))
        shadow = cv2.GaussianBlur(shadow, (0, 0), 2.0 * scene.unit)
        patch *= (1 - rng.uniform(0.25, 0.55) * shadow)[..., None]
    fill = _fill(rng, scene, class_index, alpha.shape)
    if rng.uniform() < 0.35:
        inner = cv2.erode(alpha, np.ones((3, 3), np.uint8), iterations=max(1, round(scene.unit)))
        fill = fill * (1 - rng.uniform(0.4, 0.8) * (1 - inner))[..., None]
    patch[...] = mix(patch, fill.astype(np.float32), alpha)


def _choose_center(rng: Generator, scene: Scene, anchors: list[Array], diameter: float) -> Array:
    """Sample a position, half of the time close to another shape so that they overlap."""
    height, width = scene.owner.shape
    if anchors and rng.uniform() < 0.5:
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 1.0) * diameter
        anchor = anchors[rng.integers(len(anchors))]
        center = anchor + reach * np.array((np.cos(angle), np.sin(angle)))
        return np.clip(center, (0, 0), (width, height)).astype(np.float32)
    return rng.uniform((0.04 * width, 0.04 * height), (0.96 * width, 0.96 * height)).astype(
        np.float32
    )


def try_add_shape(rng: Generator, scene: Scene, anchors: list[Array]) -> None:
    """Add a shape on top, unless it or an occluded one would be hardly visible."""
    class_index = int(rng.integers(len(THING_CLASSES)))
    diameter = scene.unit * (40 + 72 * rng.beta(1.2, 1.9))
    center = _choose_center(rng, scene, anchors, diameter)
    outline = random_outline(rng, THING_CLASSES[class_index], center, diameter)
    box = _window(outline, max(2, round(8 * scene.unit)), scene.owner.shape)
    if box is None:
        return
    left, top, right, bottom = box
    alpha = coverage(outline, box)
    mask = alpha > 0.5
    owner = scene.owner[top:bottom, left:right]
    needed = max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * outline.area)
    if np.count_nonzero(mask) < needed or not _leaves_enough(scene, owner, mask):
        return
    _paint(rng, scene, class_index, alpha, box)
    owner[mask] = FIRST_OBJECT + len(scene.objects)
    scene.objects.append(SceneObject(class_index, outline.area))
    anchors.append(center)


def add_crowd(rng: Generator, scene: Scene) -> None:
    """Add a cluster of tiny shapes of one class, labeled as a crowd."""
    height, width = scene.owner.shape
    class_index = int(rng.integers(len(THING_CLASSES)))
    spread = scene.unit * rng.uniform(12, 20)
    middle = rng.uniform((0.2 * width, 0.2 * height), (0.8 * width, 0.8 * height))
    union = np.zeros((height, width), dtype=np.uint8)
    for _ in range(int(rng.integers(14, 28))):
        center = (middle + rng.normal(0, spread, 2) * (1.3, 0.8)).astype(np.float32)
        size = scene.unit * rng.uniform(8, 12)
        outline = random_outline(rng, THING_CLASSES[class_index], center, size)
        box = _window(outline, 3, scene.owner.shape)
        if box is not None:
            alpha = coverage(outline, box)
            _paint(rng, scene, class_index, alpha, box)
            union[box[1] : box[3], box[0] : box[2]] |= (alpha > 0.5).astype(np.uint8)
    reach = 2 * max(2, round(3 * scene.unit)) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    region = cv2.morphologyEx(union, cv2.MORPH_CLOSE, kernel).astype(bool)
    scene.owner[region] = FIRST_OBJECT + len(scene.objects)
    scene.objects.append(SceneObject(class_index, float(region.sum()), crowd=True))


def _wavy_side(rng: Generator, height: int, width: int, unit: float, middle: float) -> Array:
    """Sample the approximate signed distance to a wavy line across the image, (H, W), pixels."""
    angle = rng.normal(0, 0.5) + rng.choice((0.0, 0.0, np.pi / 2))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x - width / 2, y - height / 2
    along, off = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    extent = abs(width * np.sin(angle)) + abs(height * np.cos(angle))
    wave = sum(
        unit * rng.uniform(2, 7) * np.sin(along / (unit * rng.uniform(8, 30)) + rng.uniform(0, 6))
        for _ in range(2)
    )
    return (off + wave - (middle - 0.5) * extent).astype(np.float32)


def draw_background(rng: Generator, width: int, height: int) -> Scene:
    """Draw one to three textured stuff regions with wavy borders; rarely an unlabeled smudge."""
    unit = min(width, height) / 192
    classes = rng.permutation(len(STUFF_CLASSES))[: rng.choice((1, 2, 3), p=(0.25, 0.5, 0.25))]
    image = np.zeros((height, width, 3), dtype=np.float32)
    owner = np.zeros((height, width), dtype=np.int32)
    for order, index in enumerate(classes):
        texture = STUFF_TEXTURES[STUFF_CLASSES[index]]
        paint = texture(rng, height, width, unit, random_palette(rng, (0.0, 0.35)))
        if order == 0:
            image, owner[...] = paint, 1 + index
            continue
        side = _wavy_side(rng, height, width, unit, rng.uniform(0.3, 0.7))
        image = mix(image, paint, side + 0.5)
        owner[side > 0] = 1 + index
    scene = Scene(image=image, owner=owner, unit=unit)
    if rng.uniform() < 0.04:
        _smudge(rng, scene)
    return scene


def _smudge(rng: Generator, scene: Scene) -> None:
    """Add a blurred region of unlabeled pixels."""
    height, width = scene.owner.shape
    center = rng.uniform((0, 0), (width, height)).astype(np.float32)
    outline = random_outline(rng, "circle", center, scene.unit * rng.uniform(24, 56))
    alpha = coverage(outline, (0, 0, width, height))
    haze = 0.5 + 0.15 * smooth_noise(rng, height, width, 8 * scene.unit)
    soft = cv2.GaussianBlur(scene.image, (0, 0), 6 * scene.unit)
    scene.image = mix(scene.image, 0.3 * soft + 0.7 * haze[..., None], alpha)
    scene.owner[alpha > 0.5] = 0


def apply_camera_effects(rng: Generator, scene: Scene) -> NDArray[np.uint8]:
    """Apply exposure, mild blur and mild noise; return uint8 RGB, (H, W, 3)."""
    image: NDArray[Any] = (
        (scene.image - 0.5) * rng.uniform(0.85, 1.1) + 0.5 + rng.uniform(-0.06, 0.06)
    )
    if rng.uniform() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), scene.unit * rng.uniform(0.3, 0.8))
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + grain * np.float32(rng.uniform(0.003, 0.025))
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def draw_scene(rng: Generator, width: int, height: int) -> Scene:
    """Draw a complete scene with two to eight shapes, without camera effects."""
    scene = draw_background(rng, width, height)
    if rng.uniform() < 0.03:
        add_crowd(rng, scene)
    wanted = int(rng.integers(2, 9)) + len(scene.objects)
    anchors: list[Array] = []
    for _ in range(60):
        if len(scene.objects) == wanted:
            break
        try_add_shape(rng, scene, anchors)
    return scene
