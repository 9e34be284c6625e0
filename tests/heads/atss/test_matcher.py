"""ATSS's assignment against a loop, and hand-worked cases."""

import math
import statistics

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_iou

from focalnet_det.heads.atss.atss_matcher import ATSSMatcher, matched_targets


def slow_matches(levels: list[Tensor], objects: Tensor, topk: int) -> list[int]:
    """Object of every box, or -1, one object and one box at a time."""
    boxes = [box for level in levels for box in level.tolist()]
    overlaps = box_iou(objects, torch.cat(levels)).tolist()
    owner, best = [-1] * len(boxes), [-1.0] * len(boxes)
    for g, (x0, y0, x1, y1) in enumerate(objects.tolist()):
        candidates, first = [], 0
        for level in levels:
            distances = [
                (math.dist(((a + c) / 2, (b + d) / 2), ((x0 + x1) / 2, (y0 + y1) / 2)), first + i)
                for i, (a, b, c, d) in enumerate(level.tolist())
            ]
            candidates += [index for _, index in sorted(distances)[:topk]]
            first += len(level)
        values = [overlaps[g][index] for index in candidates]
        threshold = statistics.mean(values) + statistics.stdev(values)
        for index, value in zip(candidates, values, strict=True):
            a, b, c, d = boxes[index]
            x, y = (a + c) / 2, (b + d) / 2
            inside = min(x - x0, y - y0, x1 - x, y1 - y) > 0.01
            if value >= threshold and inside and value > best[index]:
                owner[index], best[index] = g, value
    return owner


def random_objects(count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, generator=generator) * 90
    sizes = torch.rand(count, 2, generator=generator) * 60 + 2
    return torch.cat([corners, corners + sizes], dim=1)


def grid(stride: int, cells: int) -> Tensor:
    """Square boxes of 4 strides around the corners of cells."""
    y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    centers = torch.stack([x, y], dim=-1).reshape(-1, 2) * float(stride)
    return torch.cat([centers - 2 * stride, centers + 2 * stride], dim=1)


def test_matches_equal_a_loop() -> None:
    """On anchors, and on arbitrary boxes, which RepPoints v2 has."""
    positives = 0
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        # The last level has fewer boxes than candidates.
        levels = [grid(8, 16), grid(16, 8), grid(64, 2)]
        if seed % 2:
            levels = [random_objects(n, generator) for n in (40, 20, 3)]
        objects = random_objects(1 + seed % 7, generator)
        topk = (9, 3)[seed % 3 == 0]
        matches = ATSSMatcher(topk)(levels, objects)
        assert matches.tolist() == slow_matches(levels, objects, topk)
        positives += int((matches >= 0).sum())
    assert positives > 100


def test_by_hand() -> None:
    """IoU 1, 1/3 and 0: the threshold is 4/9 + 0.51, which the first box alone reaches."""
    levels = [torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [30, 30, 38, 38]])]
    objects = torch.tensor([[0.0, 0, 8, 8]])
    assert ATSSMatcher(3)(levels, objects).tolist() == [0, -1, -1]
    # The only candidate, but its center lies on the side of the object, not inside.
    assert ATSSMatcher(3)([levels[0][:1]], torch.tensor([[4.0, 0, 12, 8]])).tolist() == [-1]
    assert ATSSMatcher(1)(levels, objects).tolist() == [0, -1, -1]


def test_box_of_two_objects_goes_to_the_larger_overlap() -> None:
    levels = [torch.tensor([[0.0, 0, 8, 8]])]
    objects = torch.tensor([[0.0, 0, 16, 16], [0, 0, 9, 9], [0, 0, 8, 20]])
    assert ATSSMatcher(9)(levels, objects).tolist() == [1]


def test_without_objects() -> None:
    levels = [grid(8, 4), grid(16, 2)]
    matches = ATSSMatcher()(levels, torch.zeros(0, 4))
    assert matches.tolist() == [-1] * 20
    truth = Instances((8, 8), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    classes, boxes = matched_targets(matches, truth, 5)
    assert classes.tolist() == [5] * 20
    assert not boxes.any()


def test_topk_is_checked() -> None:
    with pytest.raises(ValueError, match="topk must be an integer between 1 and 100000, got 0"):
        ATSSMatcher(0)
