"""Points, costs, matches and losses against loops, brute force and numbers worked by hand."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from focalnet_det.heads.mask2former.mask_criterion import SetCriterion, mask_losses_at
from focalnet_det.heads.mask2former.mask_matcher import (
    HungarianMatcher,
    Target,
    pairwise_cross_entropy,
    pairwise_dice,
)
from focalnet_det.heads.mask2former.points import choose_points, sample_logits, sample_masks
from focalnet_det.heads.mask2former.transformer_decoder import Prediction
from focalnet_det.heads.set_prediction.assignment import assign


def random_prediction(images: int = 2, queries: int = 5, classes: int = 3) -> Prediction:
    return Prediction(
        torch.randn(images, queries, classes + 1, requires_grad=True),
        torch.randn(images, queries, 4, requires_grad=True),
        torch.randn(images, 4, 8, 8, requires_grad=True),
    )


def random_target(count: int, classes: int = 3, ignored: Tensor | None = None) -> Target:
    masks = torch.rand(count, 30, 27) > 0.5
    return Target(torch.randint(classes, (count,)), masks, ignored, f"picture_{count}.jpg")


def bilinear(values: Tensor, x: float, y: float) -> float:
    """Value of a map at (x, y) in pixels, centers at whole numbers, zero outside."""
    height, width = values.shape
    total = 0.0
    for row in range(height):
        for column in range(width):
            near = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            total += near * float(values[row, column])
    return total


def test_samples_are_bilinear_and_zero_outside() -> None:
    logits, points = torch.randn(2, 5, 7), 1.4 * torch.rand(2, 6, 2) - 0.2
    sampled = sample_logits(logits, points)
    for m, p in itertools.product(range(2), range(6)):
        x, y = points[m, p].tolist()
        expected = bilinear(logits[m], x * 7 - 0.5, y * 5 - 0.5)
        assert sampled[m, p].item() == pytest.approx(expected, abs=1e-5)
    one = sample_logits(logits, points[:1])
    torch.testing.assert_close(one[1], sample_logits(logits[1:], points[:1])[0])


def test_masks_are_sampled_as_if_they_were_padded() -> None:
    masks, points = torch.rand(3, 9, 6) > 0.5, torch.rand(3, 40, 2)
    padded = torch.zeros(3, 16, 12)
    padded[:, :9, :6] = masks.float()
    torch.testing.assert_close(
        sample_masks(masks, points, (16, 12)), sample_logits(padded, points), atol=1e-6, rtol=0
    )
    assert sample_masks(masks[:0], points[:0], (16, 12)).shape == (0, 40)


def test_points_are_mostly_where_a_mask_is_least_certain() -> None:
    # Certain but in the left quarter.
    logits = torch.full((1, 8, 32), 9.0)
    logits[..., :8] = 0.0
    points = choose_points(logits, 1000, oversampling=8.0, uncertain=0.75)
    assert points.shape == (1, 1000, 2)
    uncertain = (points[0, :750, 0] < 0.25).float().mean()
    assert uncertain == 1
    assert (points[0, 750:, 0] < 0.25).float().mean() == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("weighted", [False, True])
def test_costs_of_pairs_are_those_of_a_loop(weighted: bool) -> None:
    logits, wanted = 2 * torch.randn(4, 11), torch.rand(3, 11)
    counted = (torch.rand(1, 11) > 0.4).float() if weighted else None
    entropies = pairwise_cross_entropy(logits, wanted, counted)
    dice = pairwise_dice(logits, wanted, counted)
    weight = [1.0] * 11 if counted is None else counted[0].tolist()
    for q, m in itertools.product(range(4), range(3)):
        p = [1 / (1 + math.exp(-v)) for v in logits[q].tolist()]
        t = wanted[m].tolist()
        rows = list(zip(p, t, weight, strict=True))
        entropy = sum(-w * (b * math.log(a) + (1 - b) * math.log(1 - a)) for a, b, w in rows)
        assert entropies[q, m].item() == pytest.approx(entropy / sum(weight), rel=1e-4)
        overlap, sums = (sum(w * a * b for a, b, w in rows), sum(w * (a + b) for a, b, w in rows))
        assert dice[q, m].item() == pytest.approx(1 - (2 * overlap + 1) / (sums + 1), rel=1e-4)
    # Losses of matched pairs are the same numbers.
    same = None if counted is None else counted.expand(3, -1)
    by_mask, by_dice = mask_losses_at(logits[:3], wanted, same)
    assert by_mask.item() == pytest.approx(entropies[:3].diagonal().sum().item(), rel=1e-4)
    assert by_dice.item() == pytest.approx(dice[:3].diagonal().sum().item(), rel=1e-4)


@pytest.mark.parametrize(("queries", "objects"), [(5, 3), (4, 4), (3, 5), (4, 0)])
def test_matches_have_the_least_cost_of_all(queries: int, objects: int) -> None:
    costs = torch.randn(2, queries, objects)
    [layer] = assign([list(costs)], ["a", "b"])
    for cost, (chosen, of) in zip(costs, layer, strict=True):
        count = min(queries, objects)
        assert len(chosen) == len(of) == count
        best = min(
            sum(float(cost[q, m]) for q, m in zip(qs, ms, strict=True))
            for qs in itertools.permutations(range(queries), count)
            for ms in itertools.combinations(range(objects), count)
        )
        assert float(cost[chosen, of].sum()) == pytest.approx(best, abs=1e-5)


def test_a_cost_that_is_not_a_number_names_the_image() -> None:
    prediction = random_prediction()
    broken = prediction._replace(class_logits=prediction.class_logits * torch.nan)
    targets = [random_target(0), random_target(2)]
    with pytest.raises(FloatingPointError, match=r"picture_2\.jpg .number 1 of the batch, 2 obj"):
        HungarianMatcher(points=10)([prediction, broken], targets, (32, 32))


def test_class_loss_is_a_weighted_mean() -> None:
    criterion = SetCriterion(num_classes=2, no_object_weight=0.1)
    logits = torch.randn(1, 3, 3)
    target = Target(torch.tensor([1]), torch.ones(1, 2, 2, dtype=torch.bool))
    match = (torch.tensor([2]), torch.tensor([0]))
    loss = criterion.class_loss(logits, [target], [match])
    logs = logits[0].log_softmax(-1)
    expected = -(0.1 * logs[0, 2] + 0.1 * logs[1, 2] + logs[2, 1]) / 1.2
    torch.testing.assert_close(loss, expected)


def test_losses_are_published_ones_of_every_layer() -> None:
    criterion = SetCriterion(num_classes=3, points=50)
    losses = criterion([random_prediction() for _ in range(3)], [random_target(2)] * 2, (32, 32))
    assert set(losses) == {
        f"loss_{kind}{number}" for kind in ("ce", "mask", "dice") for number in ("", "_0", "_1")
    }


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (7, 1)])
def test_images_without_segments_and_with_more_than_queries(counts: tuple[int, int]) -> None:
    criterion = SetCriterion(num_classes=3, points=20)
    prediction = random_prediction()
    losses = criterion([prediction], [random_target(n) for n in counts], (32, 32))
    assert all(loss.isfinite() for loss in losses.values())
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    total.backward()
    # Every parameter gets a gradient, or processes with and without objects would not agree.
    for tensor in prediction:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    if not any(counts):
        assert losses["loss_mask"] == losses["loss_dice"] == 0


def test_ignored_pixels_change_nothing() -> None:
    """What masks say where pixels are ignored must not matter."""
    ignored = torch.zeros(30, 27, dtype=torch.bool)
    ignored[:, 13:] = True
    target = random_target(2, ignored=ignored)
    changed = target._replace(masks=target.masks ^ (ignored & (torch.rand(30, 27) > 0.5)))
    criterion, prediction = SetCriterion(num_classes=3, points=400), random_prediction(1)
    results = []
    for each in (target, changed, changed._replace(ignored=None)):
        torch.manual_seed(3)
        losses = criterion([prediction], [each], (32, 32))
        results.append([losses[f"loss_{kind}"].item() for kind in ("mask", "dice")])
    assert results[0] == pytest.approx(results[1], abs=1e-6)
    assert results[0] != pytest.approx(results[2], abs=1e-3)
