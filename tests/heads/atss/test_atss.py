"""ATSS's losses, inference and head, against slow loops and torchvision."""

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, nms, sigmoid_focal_loss

from focalnet_det.heads.atss import ATSS
from tests.helpers.nano_recipes import CLASSES, HEIGHT, WIDTH, build
from tests.helpers.shared_gradients import assert_two_processes_equal_one


def predictions(model: ATSS, generator: torch.Generator, images: int) -> tuple[Any, ...]:
    """Anchors of levels of 4x6 to 1x1 cells, and random predictions on them."""
    sizes = [(4, 6), (2, 3), (1, 2), (1, 1), (1, 1)]
    maps = [torch.zeros(images, 1, *size) for size in sizes]
    outputs = [
        [torch.randn(images, k, *size, generator=generator) for size in sizes]
        for k in (CLASSES, 4, 1)
    ]
    return maps, tuple(outputs)


def truth(boxes: list[list[float]], classes: list[int]) -> Instances:
    return Instances(
        (HEIGHT, WIDTH),
        gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.long),
    )


def decode(anchor: list[float], deltas: list[float]) -> list[float]:
    x0, y0, x1, y1 = anchor
    x = (x0 + x1) / 2 + deltas[0] / 10 * (x1 - x0)
    y = (y0 + y1) / 2 + deltas[1] / 10 * (y1 - y0)
    w, h = (x1 - x0) * math.exp(deltas[2] / 5), (y1 - y0) * math.exp(deltas[3] / 5)
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def cells(outputs: list[Tensor], image: int) -> list[list[float]]:
    """The numbers at every cell, in the order level, y, x."""
    return [v for m in outputs for v in m[image].flatten(1).T.tolist()]


@pytest.mark.parametrize("empty", [False, True])
def test_losses_equal_a_loop(empty: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    model = build("atss").train()
    maps, outputs = predictions(model, generator, 2)
    truths = [truth([[4, 6, 40, 50], [30, 10, 90, 60], [0, 0, 30, 20]], [2, 0, 1]), truth([], [])]
    truths = truths[1:] * 2 if empty else truths
    losses = model.forward_training(None, maps, outputs, truths)
    anchors = [a for level in model.anchor_generator(maps) for a in level.tensor.tolist()]
    count, classes, centerness, total, boxes = 0, 0.0, 0.0, 0.0, 0.0
    for i, own in enumerate(truths):
        matches = model.anchor_matcher(
            [a.tensor for a in model.anchor_generator(maps)], own.gt_boxes.tensor
        ).tolist()
        count += max(sum(m >= 0 for m in matches), 1)
        rows = zip(anchors, matches, *(cells(o, i) for o in outputs), strict=True)
        for anchor, match, logits, deltas, (center,) in rows:
            wanted = [0.0] * CLASSES
            if match >= 0:
                wanted[int(own.gt_classes[match])] = 1.0
                box = own.gt_boxes.tensor[match].tolist()
                x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
                sides = [x - box[0], box[2] - x, y - box[1], box[3] - y]
                target = math.sqrt(
                    min(sides[:2]) / max(sides[:2]) * min(sides[2:]) / max(sides[2:])
                )
                pair = torch.tensor([decode(anchor, deltas), box])
                boxes += target * float(generalized_box_iou_loss(pair[:1], pair[1:]).sum())
                total += target
                p = 1 / (1 + math.exp(-center))
                centerness -= target * math.log(p) + (1 - target) * math.log(1 - p)
            pair = torch.tensor([logits, wanted])
            classes += float(sigmoid_focal_loss(pair[0], pair[1], reduction="sum"))
    assert losses["loss_cls"].item() == pytest.approx(classes / count, rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(2 * boxes / max(total, 1), rel=1e-5)
    assert losses["loss_centerness"].item() == pytest.approx(centerness / count, rel=1e-5)
    assert (boxes > 0.5) != empty


def test_inference_equals_a_loop() -> None:
    """Candidates by class score alone; the score is the product; boxes are clipped before NMS."""
    generator = torch.Generator().manual_seed(2)
    model = build("atss").eval()
    model.test_topk_candidates, model.max_detections_per_image = 20, 12
    model.test_score_thresh = 0.4
    maps, outputs = predictions(model, generator, 1)
    anchors = [level.tensor.tolist() for level in model.anchor_generator(maps)]
    found: list[tuple[list[float], float, int]] = []
    for level, own in enumerate(anchors):
        logits, deltas, centers = (cells([o[level]], 0) for o in outputs)
        rows = sorted(
            ((1 / (1 + math.exp(-z)), i, k) for i, r in enumerate(logits) for k, z in enumerate(r)),
            reverse=True,
        )
        for score, i, k in rows[:20]:
            if score > 0.4:
                x0, y0, x1, y1 = decode(own[i], deltas[i])
                box = [min(max(x0, 0), WIDTH), min(max(y0, 0), HEIGHT)]
                box += [min(max(x1, 0), WIDTH), min(max(y1, 0), HEIGHT)]
                found.append((box, score / (1 + math.exp(-centers[i][0])), k))
    kept = []
    for k in range(CLASSES):
        own_rows = [row for row in found if row[2] == k]
        boxes = torch.tensor([row[0] for row in own_rows])
        scores = torch.tensor([row[1] for row in own_rows])
        kept += [own_rows[int(i)] for i in nms(boxes, scores, 0.6)]
    expected = sorted(kept, key=lambda row: -row[1])[:12]
    images: Any = type("Images", (), {"image_sizes": [(HEIGHT, WIDTH)]})
    (result,) = model.forward_inference(images, maps, outputs)
    assert len(expected) == len(result) == 12
    assert result.scores.tolist() == pytest.approx([row[1] for row in expected], rel=1e-5)
    assert result.pred_classes.tolist() == [row[2] for row in expected]
    torch.testing.assert_close(
        result.pred_boxes.tensor, torch.tensor([row[0] for row in expected]), rtol=1e-4, atol=1e-3
    )


def test_levels_have_factors_of_their_own() -> None:
    model = build("atss").eval()
    head: Any = model.head
    maps = [torch.randn(1, 64, 3, 4) for _ in range(5)]
    with torch.no_grad():
        before = head(maps)
        head.scales[2].scale.fill_(3.0)
        after = head(maps)
    for level in range(5):
        factor = 3.0 if level == 2 else 1.0
        torch.testing.assert_close(after[1][level], factor * before[1][level])
        assert torch.equal(after[0][level], before[0][level])
    biases = [m.bias for m in (*head.cls_subnet, *head.bbox_subnet) if isinstance(m, nn.Conv2d)]
    assert biases == [None, None]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One process has objects, the other none."""
    assert_two_processes_equal_one("atss", tmp_path)
