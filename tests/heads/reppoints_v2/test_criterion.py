"""RepPoints v2's losses against loops over cells."""

import math
from typing import Any

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


def slow_losses(predictions: Predictions, truths: list[Instances]) -> dict[str, float]:
    """All losses, one cell after another; the assignment of refined boxes has a test of its own."""
    sums = dict.fromkeys(("cls", "initial", "refined", "score", "offset", "pos", "neg"), 0.0)
    counts = {"initial": 0, "refined": 0, 0: 0, 1: 0}
    corner: dict[Any, float] = dict.fromkeys([(k, c) for k in ("s", "o") for c in (0, 1)], 0.0)
    weight_sum = cell_sum = 0.0
    matcher, first = ATSSMatcher(), 0
    bounds = []
    for rows, columns in SIZES:
        bounds.append((first, first + rows * columns))
        first += rows * columns
    for i, own in enumerate(truths):
        objects, labels = own.gt_boxes.tensor.tolist(), own.gt_classes.tolist()
        initial, refined = (
            boxes_of(maps, i) for maps in (predictions.initial, predictions.refined)
        )
        by_point = loops.point_matches(CELLS, objects)
        by_box = matcher(
            [torch.tensor(initial[a:b]) for a, b in bounds], own.gt_boxes.tensor
        ).tolist()
        counts["initial"] += max(sum(m >= 0 for m in by_point), 1)
        counts["refined"] += max(sum(m >= 0 for m in by_box), 1)
        for c, logits in enumerate(at_cells(predictions.logits, i)):
            unit = 4 * loops.STRIDES[CELLS[c][0]]
            targets = [0.0] * CLASSES
            if by_point[c] >= 0:
                sums["initial"] += 1 - loops.inclusive_giou(initial[c], objects[by_point[c]], unit)
            if by_box[c] >= 0:
                box = objects[by_box[c]]
                sums["refined"] += 1 - loops.inclusive_giou(refined[c], box, unit)
                targets[labels[by_box[c]]] = loops.iou(refined[c], box)
            sums["cls"] += sum(
                loops.quality_loss(loops.sigmoid(z), t)
                for z, t in zip(logits, targets, strict=True)
            )
        scores, offsets = (
            at_cells(predictions.corner_scores, i),
            at_cells(predictions.corner_offsets, i),
        )
        for k in (0, 1):
            heat, wanted = loops.corner_maps(CELLS, objects, k)
            counts[k] += max(heat.count(1.0), 1)
            for c, target in enumerate(heat):
                corner["s", k] += loops.gaussian_loss(loops.sigmoid(scores[c][k]), target)
                if target == 1:
                    corner["o", k] += sum(
                        loops.smooth_l1(offsets[c][2 * k + a] - wanted[c][a]) for a in (0, 1)
                    )
        painted = loops.paint(objects, labels, PADDED, CLASSES)
        for (level, x, y), logits in zip(CELLS, at_cells(predictions.semantic, i), strict=True):
            rows, columns = SIZES[level]
            # The nearest cell of the map of stride 8, rounded down.
            row = int(y) // loops.STRIDES[level] * (PADDED[0] // 8) // rows
            column = int(x) // loops.STRIDES[level] * (PADDED[1] // 8) // columns
            for k, z in enumerate(logits):
                p = loops.sigmoid(z)
                weight = painted.weights[k][row][column]
                if painted.values[k][row][column]:
                    sums["pos"] -= math.log(p) * (1 - p) ** 2 * weight * 0.25
                    cell_sum, weight_sum = cell_sum + 1, weight_sum + weight
                else:
                    sums["neg"] -= math.log(1 - p) * p**2 * 0.75
    return {
        "loss_cls": sums["cls"] / counts["refined"],
        "loss_box_initial": sums["initial"] / counts["initial"],
        "loss_box_refined": 2 * sums["refined"] / counts["refined"],
        "loss_corner_score": 0.25 * sum(corner["s", k] / counts[k] for k in (0, 1)) / 2,
        "loss_corner_offset": sum(corner["o", k] / counts[k] for k in (0, 1)) / 2,
        "loss_semantic": 0.1 * (sums["pos"] / (weight_sum or 1) + sums["neg"] / (cell_sum or 1)),
    }


@pytest.mark.parametrize("truths", [TRUTHS, [TRUTHS[1]] * 2], ids=["objects", "none"])
def test_losses_equal_a_loop(truths: list[Instances]) -> None:
    """In a batch without any object, where the published code divides by zero, too."""
    predictions = random_predictions(2)
    criterion = Criterion(CLASSES, loops.STRIDES, ATSSMatcher(), LossWeights())
    losses = criterion(predictions, truths, PADDED)
    expected = slow_losses(predictions, truths)
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
