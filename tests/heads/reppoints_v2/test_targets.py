"""RepPoints v2's targets against loops over objects and cells."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from focalnet_det.heads.reppoints_v2.reppoints_targets import (
    corner_targets,
    gaussian_radii,
    grid_points,
    match_points,
    semantic_targets,
)
from tests.helpers import reppoints_loops as loops

SIZES = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
CPU = torch.device("cpu")
POINTS = [grid_points(size, s, CPU) for size, s in zip(SIZES, loops.STRIDES, strict=True)]
CELLS = loops.cells(SIZES)


def objects(seed: int) -> Tensor:
    """Boxes within 192 x 128 pixels: a large one between cells; the last two are almost equal."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(6, 2, generator=generator) * torch.tensor([150.0, 90.0])
    sizes = torch.rand(6, 2, generator=generator).square() * torch.tensor([180.0, 120.0]) + 3
    ends = torch.minimum(corners + sizes, torch.tensor([192.0, 128.0]))
    boxes = torch.cat([corners, ends], dim=1)
    large = torch.tensor([[12.5, 12.3, 180.4, 116.6]])
    return torch.cat([large, boxes, boxes[-1:] + 0.7])


def test_positions() -> None:
    """x and y of every cell, without half a cell."""
    assert torch.cat(POINTS).tolist() == [[x, y] for _, x, y in CELLS]


@pytest.mark.parametrize("seed", range(4))
def test_points_equal_a_loop(seed: int) -> None:
    boxes = objects(seed)
    matches = match_points(POINTS, loops.STRIDES, boxes)
    assert matches.tolist() == loops.point_matches(CELLS, boxes.tolist())
    assert 3 <= int((matches >= 0).sum()) < len(boxes) + 1


def test_level_of_a_size() -> None:
    """32 px have level 3 and 64 px level 4; what is smaller or larger has the first or last."""
    for side, level in ((4.0, 0), (63.0, 0), (64.0, 1), (127.0, 1), (128.0, 2), (5000.0, 4)):
        matches = match_points(POINTS, loops.STRIDES, torch.tensor([[0.0, 0, side, side]]))
        (index,) = (matches >= 0).nonzero()[:, 0].tolist()
        assert CELLS[index][0] == level, side


@pytest.mark.parametrize("corner", [0, 1])
def test_corners_equal_a_loop(corner: int) -> None:
    between = 0
    for seed in range(5):
        boxes = objects(seed)
        radii = gaussian_radii(boxes)
        assert radii.tolist() == pytest.approx([loops.radius(b) for b in boxes.tolist()], rel=1e-3)
        pair = slice(2 * corner, 2 * corner + 2)
        found = corner_targets(POINTS, loops.STRIDES, boxes[:, pair], radii)
        heat, offsets = loops.corner_maps(CELLS, boxes.tolist(), corner)
        assert found.scores.tolist() == pytest.approx(heat, abs=1e-4)
        torch.testing.assert_close(found.offsets, torch.tensor(offsets), rtol=1e-4, atol=1e-5)
        assert (found.scores == 1).sum() >= 5
        between += int(((found.scores > 0) & (found.scores < 1)).sum())
    assert between > 0


@pytest.mark.parametrize("seed", range(3))
def test_semantic_map_equals_a_loop(seed: int) -> None:
    boxes = objects(seed)
    classes = torch.arange(len(boxes)) % 3
    truth = Instances((120, 180), gt_boxes=Boxes(boxes), gt_classes=classes)
    maps, weights = semantic_targets(truth, (128, 192), 3)
    painted = loops.paint(boxes.tolist(), classes.tolist(), (128, 192), 3)
    assert torch.equal(maps, torch.tensor(painted.values))
    torch.testing.assert_close(weights, torch.tensor(painted.weights))


def test_without_objects() -> None:
    none = torch.zeros(0, 4)
    assert (match_points(POINTS, loops.STRIDES, none) == -1).all()
    found = corner_targets(POINTS, loops.STRIDES, none[:, :2], gaussian_radii(none))
    assert not found.scores.any()
    assert found.offsets.shape == (len(CELLS), 2)
    truth = Instances((8, 8), gt_boxes=Boxes(none), gt_classes=torch.zeros(0).long())
    maps, weights = semantic_targets(truth, (32, 64), 2)
    assert maps.shape == weights.shape == (2, 4, 8)
    assert not maps.any()
