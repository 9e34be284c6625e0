"""Costs of assigning predictions to the segments of an image."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.focal_block.policy import without_autocast
from ..set_prediction.assignment import Match, assign
from .points import sample_logits, sample_masks
from .transformer_decoder import Prediction


class Target(NamedTuple):
    """The segments of an image.

    Attributes:
        labels: int64 (M,), classes.
        masks: bool (M, H, W), without batch padding.
        ignored: bool (H, W), pixels of which it is not known whether they belong to a segment, or
            None: then all others of a mask are background. They count in no loss of a mask.
        name: of the image, for messages.
    """

    labels: Tensor
    masks: Tensor
    ignored: Tensor | None = None
    name: str = "without a file name"


class Weights(NamedTuple):
    """Factors of the terms of the cost, and of the losses of the same names."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


PUBLISHED_WEIGHTS = Weights()


class HungarianMatcher:
    """Assign predictions by class probability, binary cross-entropy and dice at random points.

    Args:
        weights: of the three terms.
        points: uniform points of an image, at which all its masks are compared.
    Source: arXiv:2112.01527, section 3.3; arXiv:2107.06278, section 3.2.
    """

    def __init__(self, weights: Weights = PUBLISHED_WEIGHTS, points: int = 12_544) -> None:
        self.weights, self.points = weights, points

    @torch.no_grad()
    def __call__(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Target],
        padded_size: tuple[int, int],
    ) -> list[list[Match]]:
        """Return the matches of each prediction for each image.

        Raises: FloatingPointError that names the image if a cost is not finite.
        """
        with without_autocast(predictions[0].mask_features):
            costs = [
                [
                    self.cost(Prediction(*(x[i] for x in prediction)), target, padded_size)
                    for i, target in enumerate(targets)
                ]
                for prediction in predictions
            ]
        return assign(costs, [target.name for target in targets])

    def cost(self, prediction: Prediction, target: Target, padded_size: tuple[int, int]) -> Tensor:
        """Return the costs of one image, (Q, M) float32.

        Args:
            prediction: of this image, without N.
            padded_size: (height, width) of the padded image, pixels.
        """
        class_logits, mask_embedding, mask_features = prediction
        if not len(target.labels):
            return class_logits.new_zeros(len(class_logits), 0, dtype=torch.float32)
        points = torch.rand(1, self.points, 2, device=class_logits.device)
        masks = torch.einsum("qc,chw->qhw", mask_embedding.float(), mask_features.float())
        logits = sample_logits(masks, points)
        wanted = sample_masks(target.masks, points, padded_size)
        counted = counted_points(target.ignored, points, padded_size)
        by_class = -class_logits.float().softmax(-1)[:, target.labels]
        by_mask = pairwise_cross_entropy(logits, wanted, counted)
        by_dice = pairwise_dice(logits, wanted, counted)
        weights = self.weights
        return weights.classes * by_class + weights.mask * by_mask + weights.dice * by_dice


def counted_points(
    ignored: Tensor | None, points: Tensor, padded_size: tuple[int, int]
) -> Tensor | None:
    """Return which points count, (M or 1, P), 0 or 1: those whose value no ignored pixel enters.

    None for all.
    """
    if ignored is None:
        return None
    ignored = ignored[None].expand(len(points), -1, -1)
    return (sample_masks(ignored, points, padded_size) == 0).float()


def pairwise_cross_entropy(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    """Return mean binary cross-entropies of all pairs, (Q, M).

    Args:
        logits: (Q, P).
        wanted: (M, P), 0..1.
        counted: (1, P) weights of points, or None for 1.
    """
    # -log sigmoid(x) and -log (1 - sigmoid(x)).
    positive, negative = F.softplus(-logits), F.softplus(logits)
    total = torch.tensor(float(logits.shape[1]), device=logits.device)
    if counted is not None:
        positive, negative = positive * counted, negative * counted
        total = counted.sum().clamp(min=1)
    return (positive @ wanted.T + negative @ (1 - wanted).T) / total


def pairwise_dice(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    """Return dice losses of all pairs, (Q, M); arguments as in `pairwise_cross_entropy`."""
    probabilities = logits.sigmoid()
    if counted is not None:
        probabilities = probabilities * counted
    overlap = probabilities @ wanted.T
    area = (wanted if counted is None else wanted * counted).sum(-1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(-1)[:, None] + area + 1)
