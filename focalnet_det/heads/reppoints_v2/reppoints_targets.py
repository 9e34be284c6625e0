"""Compute what RepPoints v2 is trained to predict.

Source: Scalsol/RepPointsV2:mmdet/core/bbox/assigners and mmdet/datasets/pipelines.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

# A box of this many strides belongs to the level.
BASE_SCALE = 4
# A corner within the radius still gives a box of this IoU.
CORNER_OVERLAP = 0.7
SEMANTIC_STRIDE = 8


class CornerTargets(NamedTuple):
    """Targets of one corner of the boxes, on all levels of an image.

    Attributes:
        scores: (A,), 0..1; 1 at the cells nearest to a corner.
        offsets: (A, 2), x and y of the corner from its nearest cell, in cells; zero elsewhere.
    """

    scores: Tensor
    offsets: Tensor


def grid_points(size: Sequence[int], stride: int, device: torch.device) -> Tensor:
    """Return the positions of the cells of a map, (H * W, 2), x and y, pixels.

    Args:
        size: (H, W).
        stride: distance of neighbors, pixels; the first cell lies at 0, 0.
    """
    y, x = (torch.arange(side, device=device, dtype=torch.float32) * stride for side in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flip(-1).reshape(-1, 2)


@torch.no_grad()
def match_points(points: Sequence[Tensor], strides: Sequence[int], objects: Tensor) -> Tensor:
    """Match each object with the point nearest to its center, on the level of its size.

    Distances are divided by the width and the height of the object. A point that is nearest for
    several objects belongs to the nearest of them.

    Args:
        points: (A_l, 2) of each level, pixels.
        strides: of the levels, powers of 2.
        objects: (G, 4), xyxy, absolute pixels.
    Returns: (A,), index of the object of each point of all levels, -1 for none.
    """
    all_points = torch.cat(list(points))
    if not len(objects):
        return torch.full_like(all_points[:, 0], -1, dtype=torch.long)
    centers = (objects[:, :2] + objects[:, 2:]) / 2
    sizes = (objects[:, 2:] - objects[:, :2]).clamp(min=1e-6)
    levels = ((sizes / BASE_SCALE).log2().sum(dim=1) / 2).int()
    levels = levels.clamp(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    own_levels = torch.cat(
        [
            levels.new_full((len(level),), stride.bit_length() - 1)
            for level, stride in zip(points, strides, strict=True)
        ]
    )
    distances = ((all_points - centers[:, None]) / sizes[:, None]).norm(dim=-1)
    distances = torch.where(levels[:, None] == own_levels, distances, torch.inf)
    nearest, index = distances.min(dim=1)
    best = torch.full_like(distances, torch.inf)
    best.scatter_(1, index[:, None], nearest[:, None])
    distance, owner = best.min(dim=0)
    return torch.where(distance.isfinite(), owner, -1)


@torch.no_grad()
def corner_targets(
    points: Sequence[Tensor], strides: Sequence[int], corners: Tensor, radii: Tensor
) -> CornerTargets:
    """Compute heat maps and offsets of one corner of all objects; every level has every corner.

    Args:
        points: (A_l, 2) of each level, pixels.
        strides: of the levels.
        corners: (G, 2), x and y, pixels.
        radii: (G,), pixels; the Gaussian around a corner ends there.
    """
    levels = [
        _level_corner_targets(level, stride, corners, radii)
        for level, stride in zip(points, strides, strict=True)
    ]
    return CornerTargets(*(torch.cat(parts) for parts in zip(*levels, strict=True)))


def _level_corner_targets(
    points: Tensor, stride: int, corners: Tensor, radii: Tensor
) -> tuple[Tensor, Tensor]:
    if not len(corners):
        return torch.zeros_like(points[:, 0]), torch.zeros_like(points)
    distances = (points[:, None] - corners).norm(dim=-1)
    sigmas = (2 * radii + 1) / 6
    bumps = torch.exp(-distances.pow(2) / (2 * sigmas.pow(2)))
    scores = torch.where(distances < radii, bumps, 0.0).amax(dim=1)
    nearest = torch.zeros_like(distances, dtype=torch.bool)
    nearest.scatter_(0, distances.argmin(dim=0)[None], True)
    positive = nearest.any(dim=1)
    # A cell that is nearest to several corners has the offset of the last one.
    last = len(corners) - 1 - nearest.flip(1).to(torch.uint8).argmax(dim=1)
    offsets = (corners[last] - points) / stride
    return scores.masked_fill(positive, 1.0), offsets * positive[:, None]


def gaussian_radii(objects: Tensor, overlap: float = CORNER_OVERLAP) -> Tensor:
    """Return how far corners may be off until the IoU with the object is below ``overlap``.

    Args:
        objects: (G, 4), xyxy, absolute pixels.
    Returns: (G,), pixels.
    Source: arXiv:1808.01244, section 3.2: both corners inside, both outside, one of each.
    """
    sides = objects[:, 2:] - objects[:, :2]
    total, area = sides.sum(dim=1), sides.prod(dim=1)

    def smaller_root(a: float, b: Tensor, c: Tensor) -> Tensor:
        return (b - (b * b - 4 * a * c).sqrt()) / (2 * a)

    one_of_each = smaller_root(1, total, area * (1 - overlap) / (1 + overlap))
    inside = smaller_root(4, 2 * total, (1 - overlap) * area)
    b = 2 * overlap * total
    outside = ((b * b + 16 * overlap * (1 - overlap) * area).sqrt() - b) / (8 * overlap)
    return torch.stack([one_of_each, inside, outside]).amin(dim=0)


@torch.no_grad()
def semantic_targets(
    truth: Instances, padded_size: tuple[int, int], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Paint the boxes of an image, from large to small, on maps of their classes.

    Args:
        truth: ``gt_boxes`` and ``gt_classes``.
        padded_size: (H, W) of the padded image, pixels.
        num_classes: K.
    Returns: the maps, 0 or 1, and the weights of their cells, one over the area of the box that
        was painted last; (K, H // 8, W // 8) each.
    """
    rows, columns = (side // SEMANTIC_STRIDE for side in padded_size)
    boxes = truth.gt_boxes.tensor
    maps = boxes.new_zeros(num_classes, rows, columns)
    weights = torch.zeros_like(maps)
    areas = truth.gt_boxes.area()
    cells = (boxes / SEMANTIC_STRIDE).int().tolist()
    # Of boxes of equal area, the first one is painted last.
    for i in areas.argsort(stable=True).flip(0).tolist():
        x0, y0, x1, y1 = cells[i]
        area = (truth.gt_classes[i], slice(y0, y1 + 1), slice(x0, x1 + 1))
        maps[area] = 1.0
        weights[area] = 1 / areas[i]
    return maps, weights
