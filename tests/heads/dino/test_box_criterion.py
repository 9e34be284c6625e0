"""DINO's matching and losses against loops over the sets, in numbers of Python."""

import itertools
import math

import pytest
import torch
from torchvision.ops import box_convert

from focalnet_det.heads.dino.box_criterion import DINOCriterion, DINOPredictions
from focalnet_det.heads.dino.denoising import Layout
from focalnet_det.heads.set_prediction.box_matching import BoxPrediction, BoxTarget
from focalnet_det.heads.set_prediction.box_numbers import generalized_iou, inverse_sigmoid

CLASSES, QUERIES, LAYERS = 3, 4, 2
Box = list[float]


def random_set(queries: int, images: int) -> BoxPrediction:
    boxes = torch.rand(images, queries, 4) * 0.4 + 0.1
    return BoxPrediction(2 * torch.randn(images, queries, CLASSES), boxes)


def objects(*counts: int) -> list[BoxTarget]:
    return [
        BoxTarget(
            torch.randint(CLASSES, (count,)),
            box_convert(torch.rand(count, 4) * 0.4 + 0.1, "cxcywh", "xyxy"),
        )
        for count in counts
    ]


def wanted_boxes(target: BoxTarget) -> list[Box]:
    return [[(a + c) / 2, (b + d) / 2, c - a, d - b] for a, b, c, d in target.boxes.tolist()]


def giou(a: Box, b: Box) -> float:
    def corners(box: Box) -> Box:
        cx, cy, w, h = box
        return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]

    p, q = corners(a), corners(b)
    width = max(min(p[2], q[2]) - max(p[0], q[0]), 0)
    height = max(min(p[3], q[3]) - max(p[1], q[1]), 0)
    union = a[2] * a[3] + b[2] * b[3] - width * height
    hull = (max(p[2], q[2]) - min(p[0], q[0])) * (max(p[3], q[3]) - min(p[1], q[1]))
    return width * height / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def cost(logits: list[float], box: Box, label: int, wanted: Box) -> float:
    p = 1 / (1 + math.exp(-logits[label]))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    l1 = sum(abs(x - y) for x, y in zip(box, wanted, strict=True))
    return 2 * focal + 5 * l1 - 2 * giou(box, wanted)


def best_pairs(logits: list[list[float]], boxes: list[Box], target: BoxTarget) -> dict[int, int]:
    """Query -> object, by trying all assignments."""
    labels, wanted = target.labels.tolist(), wanted_boxes(target)
    if len(labels) <= len(boxes):
        tries = [
            dict(zip(chosen, range(len(labels)), strict=True))
            for chosen in itertools.permutations(range(len(boxes)), len(labels))
        ]
    else:
        tries = [
            dict(enumerate(chosen))
            for chosen in itertools.permutations(range(len(labels)), len(boxes))
        ]
    return min(
        tries,
        key=lambda pairs: sum(
            cost(logits[q], boxes[q], labels[o], wanted[o]) for q, o in pairs.items()
        ),
    )


def expected_losses(
    prediction: BoxPrediction, targets: list[BoxTarget], pairs: list[dict[int, int]], count: float
) -> tuple[float, float, float]:
    by_class = by_l1 = by_giou = 0.0
    for i, target in enumerate(targets):
        for q, (logits, box) in enumerate(
            zip(prediction.logits[i].tolist(), prediction.boxes[i].tolist(), strict=True)
        ):
            found = pairs[i].get(q)
            for k, logit in enumerate(logits):
                p = 1 / (1 + math.exp(-logit))
                if found is not None and target.labels[found] == k:
                    by_class += 0.25 * (1 - p) ** 2 * -math.log(p)
                else:
                    by_class += 0.75 * p**2 * -math.log(1 - p)
            if found is not None:
                wanted = wanted_boxes(target)[found]
                by_l1 += sum(abs(x - y) for x, y in zip(box, wanted, strict=True))
                by_giou += 1 - giou(box, wanted)
    return by_class / count, 5 * by_l1 / count, 2 * by_giou / count


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0), (6, 1)])
def test_losses_of_all_sets(counts: tuple[int, ...]) -> None:
    torch.manual_seed(sum(counts))
    targets, images, total = objects(*counts), len(counts), max(sum(counts), 1)
    layout = Layout(groups=2, most=max(counts))
    layers = [random_set(QUERIES, images) for _ in range(LAYERS)]
    denoising = [random_set(layout.width, images) for _ in range(LAYERS)]
    encoder = random_set(QUERIES, images)
    predictions = DINOPredictions(layers, encoder, denoising, layout)
    losses = DINOCriterion()(predictions, targets)
    expected = {}
    for suffix, prediction in {"_0": layers[0], "": layers[1], "_interm": encoder}.items():
        pairs = [
            best_pairs(logits.tolist(), boxes.tolist(), target)
            for logits, boxes, target in zip(*prediction, targets, strict=True)
        ]
        expected[suffix] = expected_losses(prediction, targets, pairs, total)
    for suffix, prediction in {"_dn_0": denoising[0], "_dn": denoising[1]}.items():
        pairs = [
            {2 * layout.most * g + j: j for g in range(2) for j in range(count)} for count in counts
        ]
        expected[suffix] = expected_losses(prediction, targets, pairs, 2 * total)
    assert len(losses) == 3 * len(expected)
    for suffix, values in expected.items():
        for kind, value in zip(("ce", "bbox", "giou"), values, strict=True):
            name = f"loss_{kind}{suffix}"
            assert losses[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_generalized_iou_of_known_boxes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    other = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    # 1 / 7 - 2 / 9; equal boxes; two points at one place: no term of the quotients is defined.
    expected = torch.tensor([1 / 7 - 2 / 9, 1.0, 0.0])
    torch.testing.assert_close(generalized_iou(boxes, other), expected, rtol=0, atol=1e-5)


def test_boxes_without_area_have_finite_gradients() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], requires_grad=True)
    generalized_iou(boxes, torch.tensor([0.5, 0.5, 0.5, 0.5])).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_a_cost_that_is_not_finite_names_its_image() -> None:
    prediction = random_set(QUERIES, 2)
    prediction.logits[1, 0] = math.nan
    targets = [target._replace(name=f"{i}.jpg") for i, target in enumerate(objects(1, 2))]
    with pytest.raises(FloatingPointError, match=r"image 1\.jpg .*2 objects"):
        DINOCriterion()(DINOPredictions([prediction], prediction, [], None), targets)


def test_inverse_sigmoid_stops_near_the_ends() -> None:
    found = inverse_sigmoid(torch.tensor([-1.0, 0.0, 0.5, 1.0, 0.8]))
    far = math.log(1e-3)
    expected = torch.tensor([far, far, 0.0, -far, math.log(4)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
