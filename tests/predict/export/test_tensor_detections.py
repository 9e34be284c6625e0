"""Selection of detections in a graph, beside loops, torchvision and Detectron2."""

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torchvision.ops import batched_nms

from focalnet_det.predict.export.graph_models import GraphAveragePool
from focalnet_det.predict.export.tensor_detections import (
    Candidates,
    best_per_image,
    grid_anchors,
    pool_levels,
    take,
    top_candidates,
)


def random_boxes(*shape: int, side: float = 100.0) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * side
    return torch.cat((corner, corner + 1 + torch.rand(*shape, 2) * side / 2), dim=-1)


@pytest.mark.parametrize("valid_share", [0.7, 0.05, 0.0])
def test_best_per_image_is_suppression_image_by_image(valid_share: float) -> None:
    boxes, scores = random_boxes(3, 60) - 20, torch.rand(3, 60)
    groups, valid = torch.randint(0, 5, (3, 60)), torch.rand(3, 60) < valid_share
    candidates = Candidates(boxes, scores, groups, valid)
    chosen, exists = best_per_image(candidates, group_count=5, iou_threshold=0.3, limit=12)
    for image in range(3):
        given = valid[image].nonzero()[:, 0]
        kept = batched_nms(
            boxes[image, given], scores[image, given], groups[image, given], iou_threshold=0.3
        )
        expected = given[kept][:12]
        assert chosen[image][exists[image]].tolist() == expected.tolist()
        assert exists[image].tolist() == [i < len(expected) for i in range(12)]


def test_groups_of_large_images_do_not_touch() -> None:
    """Equal boxes of 80 classes in two images of 4000 pixels, one pixel wide, are all kept."""
    boxes = torch.tensor([3999.0, 10.0, 4000.0, 20.0]).expand(2, 80, 4)
    groups = torch.arange(80).expand(2, 80)
    candidates = Candidates(boxes, torch.rand(2, 80), groups, torch.ones(2, 80, dtype=torch.bool))
    _, exists = best_per_image(candidates, group_count=80, iou_threshold=0.1, limit=100)
    assert exists.sum(dim=1).tolist() == [80, 80]


def test_top_candidates_of_fewer_than_the_limit() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    values, indices = top_candidates(scores, 5)
    assert values[:, :3].tolist() == scores.sort(descending=True).values.tolist()
    assert (values[:, 3:] == -torch.inf).all()
    assert indices.tolist() == [[1, 2, 0, 0, 0], [0, 1, 2, 0, 0]]
    assert take(scores, indices[:, :2]).tolist() == values[:, :2].tolist()


def test_anchors_are_those_of_detectron2() -> None:
    generator = DefaultAnchorGenerator(
        sizes=[[16, 24], [32, 48]], aspect_ratios=[0.5, 1.0], strides=[4, 8], offset=0.5
    )
    maps = [torch.zeros(1, 1, 5, 7), torch.zeros(1, 1, 3, 4)]
    for actual, expected in zip(grid_anchors(generator, maps), generator(maps), strict=True):
        torch.testing.assert_close(actual, expected.tensor)


@pytest.mark.parametrize("ratio", [0, 2])
def test_pooling_is_that_of_detectron2(ratio: int) -> None:
    pooler = ROIPooler(
        output_size=3, scales=(1 / 4, 1 / 8, 1 / 16), sampling_ratio=ratio, pooler_type="ROIAlignV2"
    )
    maps = [torch.rand(2, 4, 64 // 2**i, 64 // 2**i) for i in range(3)]
    boxes = torch.cat((random_boxes(2, 5, side=30), random_boxes(2, 5, side=170)), dim=1)
    expected = pooler(maps, [Boxes(image) for image in boxes])
    torch.testing.assert_close(pool_levels(pooler, maps, boxes), expected)


@pytest.mark.parametrize("size", [(7, 10), (6, 6), (2, 3)])
def test_average_pooling_is_that_of_pytorch(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    for cells in (1, 2, 3, 6):
        torch.testing.assert_close(GraphAveragePool(cells)(x), nn.AdaptiveAvgPool2d(cells)(x))
