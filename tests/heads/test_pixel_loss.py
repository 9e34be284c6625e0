"""The pixel loss against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from focalnet_det.heads.pixel_loss import PixelCrossEntropy

LN2, LN4 = math.log(2), math.log(4)


def two_class_logits(probabilities: list[float]) -> Tensor:
    """(1, 2, 1, n) whose class 1 has these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), (p / (1 - p)).log()]).view(1, 2, 1, -1).float()


# Class 1 everywhere but at the end: losses ln 2, ln 4, ignored, and for class 0 ln 2.
LOGITS = two_class_logits([0.5, 0.25, 0.9, 0.5])
LABELS = torch.tensor([[[1, 1, 255, 0]]])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (LN2 + LN4 + LN2) / 4),
        ({"average": "valid"}, (LN2 + LN4 + LN2) / 3),
        ({"class_weights": (3.0, 0.5)}, (0.5 * LN2 + 0.5 * LN4 + 3 * LN2) / 4),
        (
            {"class_weights": (3.0, 0.5), "average": "valid"},
            (0.5 * LN2 + 0.5 * LN4 + 3 * LN2) / (0.5 + 0.5 + 3),
        ),
        # Hard: a probability below 0.4. Only the second pixel is.
        ({"ohem_threshold": 0.4, "ohem_min_kept": 1}, LN4 / 4),
        ({"ohem_threshold": 0.4, "ohem_min_kept": 1, "average": "valid"}, LN4),
        # Ties at the boundary all count.
        ({"ohem_threshold": 0.1, "ohem_min_kept": 2}, (LN2 + LN4 + LN2) / 4),
        ({"ohem_threshold": 0.7, "ohem_min_kept": 1}, (LN2 + LN4 + LN2) / 4),
        ({"ohem_threshold": 0.1, "ohem_min_kept": 100_000}, (LN2 + LN4 + LN2) / 4),
    ],
)
def test_by_hand(fields: dict, expected: float) -> None:
    assert PixelCrossEntropy(**fields)(LOGITS, LABELS).item() == pytest.approx(expected, rel=1e-6)


def test_class_weights_follow_the_label() -> None:
    labels = torch.tensor([[[1, 0]]])
    loss = PixelCrossEntropy(class_weights=(10.0, 1.0))(two_class_logits([0.5, 0.5]), labels)
    assert loss.item() == pytest.approx((LN2 + 10 * LN2) / 2)


def test_logits_are_resized_to_the_labels() -> None:
    # Half-pixel centres: weights 3/4 and 1/4 between two logits.
    logits = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    labels = torch.ones(1, 1, 4, dtype=torch.long)
    values = [0.0, 1.0, 3.0, 4.0]
    expected = sum(math.log1p(math.exp(-value)) for value in values) / 4
    assert PixelCrossEntropy()(logits, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("average", ["all", "valid"])
@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0)])
def test_nothing_but_ignored_pixels(average: str, threshold: float | None, weights: object) -> None:
    loss = PixelCrossEntropy(average=average, ohem_threshold=threshold, class_weights=weights)
    logits = LOGITS.clone().requires_grad_()
    value = loss(logits, torch.full_like(LABELS, 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


def test_unknown_average_is_an_error() -> None:
    with pytest.raises(ValueError, match="'mean'.*all, valid"):
        PixelCrossEntropy(average="mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_weights": (1.0, -1.0)},
            "class_weights must be a number between 0 and .* got -1.0",
        ),
        ({"class_weights": (1.0, float("inf"))}, "class_weights .* got inf"),
        ({"ohem_threshold": 1.5}, "ohem_threshold must be a number between 0 and 1, got 1.5"),
        ({"ohem_min_kept": -1}, "ohem_min_kept must be an integer between 0 and .* got -1"),
    ],
)
def test_bad_values_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCrossEntropy(**options)
