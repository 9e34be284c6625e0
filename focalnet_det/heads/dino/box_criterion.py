"""DINO's losses, over the sets of all layers, of the encoder and of denoising."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops.focal_block.policy import without_autocast
from ..set_prediction.assignment import Match, assign, mean_object_count
from ..set_prediction.box_matching import (
    BoxPrediction,
    BoxTarget,
    BoxWeights,
    matching_costs,
    set_losses,
)
from ..set_prediction.box_numbers import (
    generalized_iou_loss,
    pairwise_generalized_iou,
    to_xyxy,
)
from .denoising import Layout, denoising_matches

COST_WEIGHTS = BoxWeights(classes=2.0, l1=5.0, giou=2.0)
LOSS_WEIGHTS = BoxWeights(classes=1.0, l1=5.0, giou=2.0)


class DINOPredictions(NamedTuple):
    """Predictions of a batch.

    Boxes are cxcywh, relative to the image without batch padding, 0..1.

    Attributes:
        layers: of the queries after each decoder layer; the last one counts.
        encoder: of the tokens that became queries.
        denoising: of the denoising queries after each decoder layer; empty in evaluation.
        layout: of the denoising queries; None in evaluation.
    """

    layers: list[BoxPrediction]
    encoder: BoxPrediction
    denoising: list[BoxPrediction]
    layout: Layout | None


class DINOCriterion(nn.Module):
    """Focal loss of classes, L1 and generalized IoU loss of boxes, over the number of objects.

    Args:
        cost_weights: of the terms of the matching cost.
        loss_weights: of the losses.
    Source: arXiv:2203.03605, appendix; FocalNet/FocalNet-DINO:models/dino/dino.py (SetCriterion).
    """

    def __init__(
        self,
        *,
        cost_weights: BoxWeights | Sequence[float] = COST_WEIGHTS,
        loss_weights: BoxWeights | Sequence[float] = LOSS_WEIGHTS,
    ) -> None:
        super().__init__()
        self.cost_weights = BoxWeights(*cost_weights)
        self.loss_weights = BoxWeights(*loss_weights)

    def forward(
        self, predictions: DINOPredictions, targets: Sequence[BoxTarget]
    ) -> dict[str, Tensor]:
        """Return the weighted losses, by their published names.

        Args:
            targets: of the images of the batch; some or all may be without objects.
        Raises: FloatingPointError that names the image if a matching cost is not finite.
        """
        *auxiliary, last = predictions.layers
        sets = {"": last, **{f"_{i}": p for i, p in enumerate(auxiliary)}}
        sets["_interm"] = predictions.encoder
        matches = dict(zip(sets, self.match(list(sets.values()), targets), strict=True))
        count = sum(len(target.labels) for target in targets)
        objects = mean_object_count(count, last.logits.device)
        losses: dict[str, Tensor] = {}
        for suffix, prediction in sets.items():
            losses |= self.losses(prediction, targets, matches[suffix], objects, suffix)
        if predictions.layout is not None:
            copies = objects * predictions.layout.groups
            own = denoising_matches(targets, predictions.layout, last.logits.device)
            *auxiliary, last = predictions.denoising
            sets = {"_dn": last, **{f"_dn_{i}": p for i, p in enumerate(auxiliary)}}
            for suffix, prediction in sets.items():
                losses |= self.losses(prediction, targets, own, copies, suffix)
        return losses

    @torch.no_grad()
    def match(
        self, predictions: Sequence[BoxPrediction], targets: Sequence[BoxTarget]
    ) -> list[list[Match]]:
        """Return for each set of predictions and each image the matches of least cost."""
        with without_autocast(predictions[0].logits):
            costs = [
                [
                    matching_costs(
                        logits,
                        to_xyxy(boxes),
                        target,
                        self.cost_weights,
                        box_format="cxcywh",
                        epsilon=1e-8,
                        overlap=pairwise_generalized_iou,
                    )
                    for logits, boxes, target in zip(*prediction, targets, strict=True)
                ]
                for prediction in predictions
            ]
        return assign(costs, [target.name for target in targets])

    def losses(
        self,
        prediction: BoxPrediction,
        targets: Sequence[BoxTarget],
        matches: Sequence[Match],
        objects: Tensor,
        suffix: str,
    ) -> dict[str, Tensor]:
        """Return the weighted losses of one set of predictions.

        Args:
            objects: number by which sums are divided, ().
            suffix: of the names.
        """
        with without_autocast(prediction.logits):
            sums = set_losses(
                prediction.logits,
                to_xyxy(prediction.boxes),
                targets,
                matches,
                box_format="cxcywh",
                overlap_loss=generalized_iou_loss,
            )
        weights = self.loss_weights
        return {
            f"loss_ce{suffix}": weights.classes * sums.classes / objects,
            f"loss_bbox{suffix}": weights.l1 * sums.l1 / objects,
            f"loss_giou{suffix}": weights.giou * sums.giou / objects,
        }
