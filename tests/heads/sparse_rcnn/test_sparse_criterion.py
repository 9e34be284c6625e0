"""Sparse R-CNN's matching and losses equal loops over images, proposals and objects."""

import itertools
import math

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from torch import Tensor

from focalnet_det.heads.set_prediction.box_matching import (
    BoxTarget,
    BoxWeights,
    matching_costs,
    set_losses,
)
from focalnet_det.heads.sparse_rcnn.sparse_criterion import SparseCriterion, StagePrediction

CLASSES = 3
SIZES = torch.tensor([[80.0, 60.0, 80.0, 60.0], [64.0, 64.0, 64.0, 64.0]])


def boxes_of(count: int, seed: int) -> Tensor:
    """Random boxes, xyxy, 0..1, some of them a little outside."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(count, 2, generator=generator)
    half = 0.05 + 0.2 * torch.rand(count, 2, generator=generator)
    return torch.cat((center - half, center + half), dim=1)


def giou(a: list[float], b: list[float]) -> float:
    area_a, area_b = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = area_a + area_b - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop_cost(logits: list[float], box: list[float], label: int, truth: list[float]) -> float:
    p = sigmoid(logits[label])
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-12)
    negative = 0.75 * p**2 * -math.log(1 - p + 1e-12)
    l1 = sum(abs(x - y) for x, y in zip(box, truth, strict=True))
    return 2 * (positive - negative) + 5 * l1 - 2 * giou(box, truth)


def best_pairs(cost: list[list[float]], objects: int) -> list[tuple[int, int]]:
    """Try every assignment: pairs of proposal and object of least total cost."""
    proposals = range(len(cost))
    choices = itertools.permutations(proposals, objects)
    best = min(choices, key=lambda chosen: sum(cost[q][m] for m, q in enumerate(chosen)))
    return sorted((q, m) for m, q in enumerate(best))


@pytest.mark.parametrize("objects", [(2, 3), (3, 0), (0, 0)])
def test_losses_equal_a_loop(objects: tuple[int, int]) -> None:
    torch.manual_seed(sum(objects))
    proposals = 5
    targets = [
        BoxTarget(torch.randint(CLASSES, (count,)), boxes_of(count, 10 + i), f"{i}.jpg")
        for i, count in enumerate(objects)
    ]
    stages = []
    for k in range(2):
        relative = torch.stack([boxes_of(proposals, 100 * k + i) for i in range(2)])
        logits = (2 * torch.randn(2, proposals, CLASSES)).requires_grad_()
        boxes = (relative * SIZES[:, None]).requires_grad_()
        stages.append(StagePrediction(logits, boxes, torch.zeros(2, proposals, 1)))
    losses = SparseCriterion()(stages, targets, SIZES)
    count = max(sum(objects), 1)
    for k, stage in enumerate(stages):
        by_class = by_distance = by_overlap = 0.0
        for i, target in enumerate(targets):
            logits = stage.logits[i].tolist()
            boxes = (stage.boxes[i] / SIZES[i]).tolist()
            truths = target.boxes.tolist()
            labels = target.labels.tolist()
            cost = [
                [loop_cost(row, box, label, truth)
                 for label, truth in zip(labels, truths, strict=True)]
                for row, box in zip(logits, boxes, strict=True)
            ]  # fmt: skip
            pairs = dict(best_pairs(cost, objects[i]))
            for q in range(proposals):
                for c in range(CLASSES):
                    p = sigmoid(logits[q][c])
                    if q in pairs and labels[pairs[q]] == c:
                        by_class -= 0.25 * (1 - p) ** 2 * math.log(p)
                    else:
                        by_class -= 0.75 * p**2 * math.log(1 - p)
                if q in pairs:
                    truth = truths[pairs[q]]
                    by_distance += sum(abs(x - y) for x, y in zip(boxes[q], truth, strict=True))
                    by_overlap += 1 - giou(boxes[q], truth)
        expected = (2 * by_class / count, 5 * by_distance / count, 2 * by_overlap / count)
        found = [losses[f"loss_{name}_stage{k}"].item() for name in ("cls", "box", "giou")]
        assert found == pytest.approx(expected, rel=1e-4)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for stage in stages:
        assert stage.logits.grad is not None
        assert stage.boxes.grad is not None
        assert bool(stage.boxes.grad.any()) == (sum(objects) > 0)


def test_more_objects_than_proposals() -> None:
    """Each proposal gets an object of its own; the others are nobody's."""
    boxes = boxes_of(4, 1)
    stage = StagePrediction(
        torch.zeros(1, 2, CLASSES), boxes[None, [3, 1]] * SIZES[:1, None], torch.zeros(1, 2, 1)
    )
    target = BoxTarget(torch.zeros(4, dtype=torch.long), boxes)
    ((match,),) = SparseCriterion().match([stage], [boxes[None, [3, 1]]], [target])
    assert [x.tolist() for x in match] == [[0, 1], [3, 1]]
    losses = SparseCriterion()([stage], [target], SIZES[:1])
    assert float(losses["loss_box_stage0"]) == pytest.approx(0, abs=1e-5)
    # Six of p = 1/2, two of them positive, over two matched proposals.
    entropy = math.log(2) * 0.25 * (2 * 0.25 + 4 * 0.75) / 2
    assert float(losses["loss_cls_stage0"]) == pytest.approx(2 * entropy, rel=1e-5)


def test_distance_of_centers_and_sizes() -> None:
    """The form that DETR and its successors compare: by hand."""
    box, truth = torch.tensor([[0.1, 0.2, 0.5, 0.6]]), torch.tensor([[0.2, 0.2, 0.8, 0.4]])
    target = BoxTarget(torch.tensor([0]), truth)
    only_l1 = BoxWeights(0.0, 1.0, 0.0)
    logits = torch.zeros(1, 1)
    # Centers (0.3, 0.4) and (0.5, 0.3), sizes (0.4, 0.4) and (0.6, 0.2).
    by_center = matching_costs(logits, box, target, only_l1, box_format="cxcywh", epsilon=1e-8)
    assert float(by_center) == pytest.approx(0.2 + 0.1 + 0.2 + 0.2)
    by_corner = matching_costs(logits, box, target, only_l1, box_format="xyxy", epsilon=1e-8)
    assert float(by_corner) == pytest.approx(0.1 + 0.3 + 0.2)
    match = [(torch.tensor([0]), torch.tensor([0]))]
    losses = set_losses(logits[None], box[None], [target], match, box_format="cxcywh")
    assert float(losses.l1) == pytest.approx(0.7)


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="the weight of giou must be"):
        SparseCriterion((1.0, 1.0, -1.0))
