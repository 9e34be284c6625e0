"""RepPoints v2's losses against loops over cells."""

import math
from itertools import accumulate, pairwise

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from focalnet_det.heads.atss import ATSSMatcher
from focalnet_det.heads.reppoints_v2.reppoints_criterion import Criterion, LossWeights
from focalnet_det.heads.reppoints_v2.reppoints_head import Predictions
from tests.helpers import reppoints_loops as loops

SIZES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
PADDED = (64, 96)
CLASSES = 3
CELLS = loops.cells(SIZES)


def random_predictions(images: int) -> Predictions:
    """Points span boxes of some cells around their own; the other numbers are arbitrary."""
    generator = torch.Generator().manual_seed(4)

    def maps(channels: int) -> list[Tensor]:
        return [torch.randn(images, channels, *size, generator=generator) for size in SIZES]

    found = Predictions(maps(CLASSES), maps(18), maps(18), maps(2), maps(4), maps(CLASSES))
    for points in (found.initial, found.refined):
        for level in points:
            level[:, :2] -= 1.5
            level[:, 2:4] += 1.5
            level.requires_grad_()
    return found


def truth(boxes: list[list[float]], classes: list[int]) -> Instances:
    return Instances(
        PADDED,
        gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.long),
    )


TRUTHS = [
    truth([[4, 6, 40, 50], [30, 10, 90, 60], [2, 3, 21, 20], [33, 12, 85, 61]], [2, 0, 1, 0]),
    truth([], []),
]


def at_cells(maps: list[Tensor], image: int) -> list[list[float]]:
    return [v for m in maps for v in m[image].detach().flatten(1).T.tolist()]


def boxes_of(maps: list[Tensor], image: int) -> list[list[float]]:
    found = []
    for (level, x, y), points in zip(CELLS, at_cells(maps, image), strict=True):
        s = loops.STRIDES[level]
        y0, x0, y1, x1 = points[:4]
        found.append([x + s * x0, y + s * y0, x + s * x1, y + s * y1])
    return found


def slow_box_losses(predictions: Predictions, truths: list[Instances]) -> dict[str, float]:
    """Losses of classes and boxes; the assignment of refined boxes has a test of its own."""
    sums, counts = dict.fromkeys(("cls", "initial", "refined"), 0.0), [0, 0]
    matcher, ends = ATSSMatcher(), list(accumulate(rows * columns for rows, columns in SIZES))
    for i, own in enumerate(truths):
        objects, labels = own.gt_boxes.tensor.tolist(), own.gt_classes.tolist()
        initial, refined = (
            boxes_of(maps, i) for maps in (predictions.initial, predictions.refined)
        )
        levels = [torch.tensor(initial[a:b]) for a, b in pairwise([0, *ends])]
        by_point = loops.point_matches(CELLS, objects)
        by_box = matcher(levels, own.gt_boxes.tensor).tolist()
        for k, matches in enumerate((by_point, by_box)):
            counts[k] += max(sum(m >= 0 for m in matches), 1)
        for c, logits in enumerate(at_cells(predictions.logits, i)):
            unit, targets = 4 * loops.STRIDES[CELLS[c][0]], [0.0] * CLASSES
            if by_point[c] >= 0:
                sums["initial"] += 1 - loops.inclusive_giou(initial[c], objects[by_point[c]], unit)
            if by_box[c] >= 0:
                box = objects[by_box[c]]
                sums["refined"] += 1 - loops.inclusive_giou(refined[c], box, unit)
                targets[labels[by_box[c]]] = loops.iou(refined[c], box)
            pairs = zip(logits, targets, strict=True)
            sums["cls"] += sum(loops.quality_loss(loops.sigmoid(z), t) for z, t in pairs)
    return {
        "loss_cls": sums["cls"] / counts[1],
        "loss_box_initial": sums["initial"] / counts[0],
        "loss_box_refined": 2 * sums["refined"] / counts[1],
    }


def slow_corner_losses(predictions: Predictions, truths: list[Instances]) -> dict[str, float]:
    """Means over both corners."""
    score_loss = offset_loss = 0.0
    for k in (0, 1):
        by_score, by_offset, count = 0.0, 0.0, 0
        for i, own in enumerate(truths):
            heat, wanted = loops.corner_maps(CELLS, own.gt_boxes.tensor.tolist(), k)
            count += max(heat.count(1.0), 1)
            scores = at_cells(predictions.corner_scores, i)
            offsets = at_cells(predictions.corner_offsets, i)
            for c, target in enumerate(heat):
                by_score += loops.gaussian_loss(loops.sigmoid(scores[c][k]), target)
                if target == 1:
                    differences = (offsets[c][2 * k + a] - wanted[c][a] for a in (0, 1))
                    by_offset += sum(loops.smooth_l1(d) for d in differences)
        score_loss, offset_loss = score_loss + by_score / count, offset_loss + by_offset / count
    return {"loss_corner_score": 0.25 * score_loss / 2, "loss_corner_offset": offset_loss / 2}


def slow_semantic_loss(predictions: Predictions, truths: list[Instances]) -> dict[str, float]:
    """Positive cells by the weights of their boxes, and all others."""
    positive = negative = weights = 0.0
    count = 0
    for i, own in enumerate(truths):
        boxes, labels = own.gt_boxes.tensor.tolist(), own.gt_classes.tolist()
        painted = loops.paint(boxes, labels, PADDED, CLASSES)
        for (level, x, y), logits in zip(CELLS, at_cells(predictions.semantic, i), strict=True):
            rows, columns = SIZES[level]
            # The nearest cell of the map of stride 8, rounded down.
            row = int(y) // loops.STRIDES[level] * (PADDED[0] // 8) // rows
            column = int(x) // loops.STRIDES[level] * (PADDED[1] // 8) // columns
            for k, z in enumerate(logits):
                p, weight = loops.sigmoid(z), painted.weights[k][row][column]
                if painted.values[k][row][column]:
                    positive -= math.log(p) * (1 - p) ** 2 * weight * 0.25
                    count, weights = count + 1, weights + weight
                else:
                    negative -= math.log(1 - p) * p**2 * 0.75
    return {"loss_semantic": 0.1 * (positive / (weights or 1) + negative / (count or 1))}


@pytest.mark.parametrize("truths", [TRUTHS, [TRUTHS[1]] * 2], ids=["objects", "none"])
def test_losses_equal_a_loop(truths: list[Instances]) -> None:
    """In a batch without any object, where the published code divides by zero, too."""
    predictions = random_predictions(2)
    criterion = Criterion(CLASSES, loops.STRIDES, ATSSMatcher(), LossWeights())
    losses = criterion(predictions, truths, PADDED)
    expected = {
        **slow_box_losses(predictions, truths),
        **slow_corner_losses(predictions, truths),
        **slow_semantic_loss(predictions, truths),
    }
    assert {n: float(v.detach()) for n, v in losses.items()} == pytest.approx(expected, rel=2e-4)
    sum(losses.values()).backward()
    for level in (*predictions.initial, *predictions.refined):
        assert level.grad is not None
        assert level.grad.isfinite().all()
        # Points beside the first two get no gradient from boxes.
        assert not level.grad[:, 4:].any()
    if truths is TRUTHS:
        assert all(value > 0.01 for value in expected.values())


def test_large_logits_stay_finite() -> None:
    predictions = random_predictions(2)
    large = Predictions(*([100 * level.detach() for level in maps] for maps in predictions))
    losses = Criterion(CLASSES, loops.STRIDES, ATSSMatcher(), LossWeights())(large, TRUTHS, PADDED)
    assert all(loss.isfinite() for loss in losses.values())
