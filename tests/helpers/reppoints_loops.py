"""RepPoints v2's targets and losses, one object and one cell at a time, in plain Python."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = Sequence[float]
# Level, position in pixels.
Cell = tuple[int, float, float]
STRIDES = (8, 16, 32, 64, 128)


def cells(sizes: Sequence[tuple[int, int]]) -> list[Cell]:
    """Cells of maps of (rows, columns), in the order level, y, x."""
    return [
        (level, float(x * STRIDES[level]), float(y * STRIDES[level]))
        for level, (rows, columns) in enumerate(sizes)
        for y in range(rows)
        for x in range(columns)
    ]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def point_matches(points: list[Cell], objects: Sequence[Box]) -> list[int]:
    """Object of every point, or -1; objects are visited in their order."""
    owner, best = [-1] * len(points), [math.inf] * len(points)
    for g, (x0, y0, x1, y1) in enumerate(objects):
        w, h = x1 - x0, y1 - y0
        level = min(max(int((math.log2(w / 4) + math.log2(h / 4)) / 2), 3), 7) - 3
        distances = [
            (math.hypot((x - (x0 + x1) / 2) / w, (y - (y0 + y1) / 2) / h), i)
            for i, (own, x, y) in enumerate(points)
            if own == level
        ]
        distance, i = min(distances)
        if distance < best[i]:
            owner[i], best[i] = g, distance
    return owner


def radius(box: Box, overlap: float = 0.7) -> float:
    """Largest shift of corners at which the IoU is still ``overlap``, by bisection."""
    w, h = box[2] - box[0], box[3] - box[1]

    def worst(r: float) -> float:
        shifted = (w - r) * (h - r) / (2 * w * h - (w - r) * (h - r))
        inside = max(w - 2 * r, 0) * max(h - 2 * r, 0) / (w * h)
        outside = w * h / ((w + 2 * r) * (h + 2 * r))
        return min(shifted, inside, outside)

    low, high = 0.0, min(w, h)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if worst(middle) > overlap else (low, middle)
    return low


def corner_maps(
    points: list[Cell], objects: Sequence[Box], corner: int
) -> tuple[list[float], list[tuple[float, float]]]:
    """Heat and offsets at every cell, of corner 0 (top left) or 1."""
    heat, offsets = [0.0] * len(points), [(0.0, 0.0)] * len(points)
    for box in objects:
        x, y = box[2 * corner], box[2 * corner + 1]
        reach = radius(box)
        sigma = (2 * reach + 1) / 6
        for i, (_, px, py) in enumerate(points):
            distance = math.hypot(px - x, py - y)
            if distance < reach:
                heat[i] = max(heat[i], math.exp(-(distance**2) / (2 * sigma**2)))
    for box in objects:
        x, y = box[2 * corner], box[2 * corner + 1]
        for level, stride in enumerate(STRIDES):
            candidates = [
                (math.hypot(px - x, py - y), i)
                for i, (own, px, py) in enumerate(points)
                if own == level
            ]
            _, i = min(candidates)
            heat[i] = 1.0
            offsets[i] = ((x - points[i][1]) / stride, (y - points[i][2]) / stride)
    return heat, offsets


def iou(a: Box, b: Box) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(w, 0) * max(h, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def inclusive_giou(a: Box, b: Box, unit: float) -> float:
    """GIoU of boxes divided by a unit, whose sides are one longer than the difference."""
    a, b = [v / unit for v in a], [v / unit for v in b]

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    overlap = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    sides = [(v[2] - v[0] + 1) * (v[3] - v[1] + 1) for v in (a, b)]
    union = sum(sides) - overlap
    return overlap / union - (hull - union) / hull


def quality_loss(score: float, target: float) -> float:
    entropy = -target * math.log(score) - (1 - target) * math.log(1 - score)
    return entropy * (target - score) ** 2


def gaussian_loss(score: float, target: float) -> float:
    if target == 1:
        return -math.log(score) * (1 - score) ** 2
    return -math.log(1 - score) * score**2 * (1 - target) ** 4


def smooth_l1(difference: float, beta: float = 1 / 9) -> float:
    d = abs(difference)
    return d - beta / 2 if d >= beta else d * d / (2 * beta)


@dataclass
class Painted:
    """A map of classes and weights, by class, row and column."""

    values: list[list[list[float]]]
    weights: list[list[list[float]]]


def paint(
    objects: Sequence[Box], classes: Sequence[int], size: tuple[int, int], num_classes: int
) -> Painted:
    """Boxes on a map of an eighth of the size, from large to small."""
    rows, columns = size[0] // 8, size[1] // 8
    shape = [[[0.0] * columns for _ in range(rows)] for _ in range(num_classes)]
    found = Painted(shape, [[list(row) for row in plane] for plane in shape])
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in objects]
    for g in sorted(range(len(objects)), key=lambda g: -areas[g]):
        x0, y0, x1, y1 = (int(v / 8) for v in objects[g])
        for y in range(y0, min(y1, rows - 1) + 1):
            for x in range(x0, min(x1, columns - 1) + 1):
                found.values[classes[g]][y][x] = 1.0
                found.weights[classes[g]][y][x] = 1 / areas[g]
    return found
