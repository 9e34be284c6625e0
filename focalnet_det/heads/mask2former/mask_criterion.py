"""Mask2Former's losses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.checks import check_integer, check_number
from ..set_prediction.assignment import Match, mean_object_count, mean_over_processes
from .mask_matcher import PUBLISHED_WEIGHTS, HungarianMatcher, Target, Weights, counted_points
from .points import choose_points, sample_logits, sample_masks
from .transformer_decoder import Prediction


class SetCriterion(nn.Module):
    """Cross-entropy of classes; binary cross-entropy and dice of masks at chosen points.

    Args:
        num_classes: K.
        weights: factors of the losses and of the matching costs.
        no_object_weight: of queries without a segment in the cross-entropy.
        points: of a mask, in losses and in matching.
        oversampling, uncertain: see `choose_points`.
    Source: arXiv:2112.01527, section 3.3 and appendix; facebookresearch/Mask2Former:mask2former/
    modeling/criterion.py.
    """

    empty_weight: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        weights: Weights | Sequence[float] = PUBLISHED_WEIGHTS,
        no_object_weight: float = 0.1,
        points: int = 12_544,
        oversampling: float = 3.0,
        uncertain: float = 0.75,
    ) -> None:
        super().__init__()
        check_integer("points", points, 1, 10_000_000)
        check_number("no_object_weight", no_object_weight, 0, 1e6)
        check_number("oversampling", oversampling, 1, 1000)
        check_number("uncertain", uncertain, 0, 1)
        self.weights = Weights(*weights)
        self.points, self.oversampling, self.uncertain = points, oversampling, uncertain
        self.matcher = HungarianMatcher(self.weights, points)
        # Published files hold it.
        self.register_buffer("empty_weight", torch.ones(num_classes + 1))
        self.empty_weight[-1] = no_object_weight

    def forward(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Target],
        padded_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Return the weighted losses of all predictions, by their published names.

        Args:
            predictions: of all layers; the last one's losses have no number.
            targets: of the images of the batch; some or all may be without segments.
            padded_size: (height, width) of the padded images, pixels.
        Raises: FloatingPointError that names the image if a matching cost is not finite.
        """
        matches = self.matcher(predictions, targets, padded_size)
        count = sum(len(target.labels) for target in targets)
        segments = mean_object_count(count, predictions[0].class_logits.device)
        losses = {}
        for i, prediction in enumerate(predictions):
            number = "" if i == len(predictions) - 1 else f"_{i}"
            by_mask, by_dice = self.mask_losses(prediction, targets, matches[i], padded_size)
            by_class = self.class_loss(prediction.class_logits, targets, matches[i])
            losses[f"loss_ce{number}"] = self.weights.classes * by_class
            losses[f"loss_mask{number}"] = self.weights.mask * by_mask / segments
            losses[f"loss_dice{number}"] = self.weights.dice * by_dice / segments
        return losses

    def class_loss(
        self, logits: Tensor, targets: Sequence[Target], matches: Sequence[Match]
    ) -> Tensor:
        """Return the weighted mean cross-entropy of all queries, logits (N, Q, K + 1).

        The mean is over the queries of all processes, so that several processes train as one with
        all their images would. The published code takes each process' own mean, which is the same
        in one process.
        """
        nothing = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:2], nothing, dtype=torch.int64, device=logits.device)
        for i, (target, (queries, segments)) in enumerate(zip(targets, matches, strict=True)):
            labels[i, queries] = target.labels[segments]
        total = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), self.empty_weight, reduction="sum"
        )
        return total / mean_over_processes(self.empty_weight[labels].sum())

    def mask_losses(
        self,
        prediction: Prediction,
        targets: Sequence[Target],
        matches: Sequence[Match],
        padded_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of binary cross-entropies and of dice losses of matched masks.

        Only matched masks are computed, at the resolution of the features.
        """
        masks = [
            torch.einsum("qc,chw->qhw", embedding[queries], features)
            for (queries, _), embedding, features in zip(
                matches, prediction.mask_embedding, prediction.mask_features, strict=True
            )
        ]
        logits = torch.cat(masks).float()
        points = choose_points(
            logits, self.points, oversampling=self.oversampling, uncertain=self.uncertain
        )
        wanted, counted = [], []
        split = points.split([len(queries) for queries, _ in matches])
        for target, (_, segments), own in zip(targets, matches, split, strict=True):
            wanted.append(sample_masks(target.masks[segments], own, padded_size))
            weight = counted_points(target.ignored, own, padded_size)
            counted.append(torch.ones_like(wanted[-1]) if weight is None else weight)
        sampled = sample_logits(logits, points) if len(logits) else logits.flatten(1)[:, :0]
        if all(target.ignored is None for target in targets):
            return mask_losses_at(sampled, torch.cat(wanted), None)
        return mask_losses_at(sampled, torch.cat(wanted), torch.cat(counted))


def mask_losses_at(logits: Tensor, wanted: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return sums over masks of mean binary cross-entropy and of dice, two scalars.

    Args:
        logits: (M, P); (0, 0) without masks, and then zeros with a gradient.
        wanted: (M, P), 0..1.
        counted: (M, P), weights of the points; None for 1.
    """
    if not len(logits):
        return logits.sum(), logits.sum()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probabilities = logits.sigmoid()
    if counted is None:
        by_mask = entropy.mean(1)
        overlap, sums = (probabilities * wanted).sum(-1), (probabilities + wanted).sum(-1)
    else:
        by_mask = (entropy * counted).sum(1) / counted.sum(1).clamp(min=1)
        overlap = (probabilities * wanted * counted).sum(-1)
        sums = ((probabilities + wanted) * counted).sum(-1)
    return by_mask.sum(), (1 - (2 * overlap + 1) / (sums + 1)).sum()
