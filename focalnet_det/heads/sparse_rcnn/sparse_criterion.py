"""Sparse R-CNN's matching and losses."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers.checks import check_number
from ..set_prediction.assignment import Match, assign, mean_object_count
from ..set_prediction.box_matching import BoxTarget, BoxWeights, matching_costs, set_losses

# Added to probabilities before their logarithm in the matching cost, as in mmdet.
EPSILON = 1e-12


class StagePrediction(NamedTuple):
    """Predictions of a stage.

    Attributes:
        logits: (N, Q, K).
        boxes: (N, Q, 4), xyxy, absolute pixels, not clipped to the image.
        features: (N, Q, C), proposal features for the next stage.
    """

    logits: Tensor
    boxes: Tensor
    features: Tensor


class SparseCriterion(nn.Module):
    """Hungarian matching and focal, L1 and GIoU losses of every stage.

    Args:
        weights: factors of the losses and of the matching costs.
    Source: arXiv:2011.12450, section 3.2; open-mmlab/mmdetection:mmdet/models/roi_heads/
        sparse_roi_head.py.
    """

    def __init__(self, weights: BoxWeights | Sequence[float] = BoxWeights()) -> None:  # noqa: B008
        super().__init__()
        self.weights = BoxWeights(*weights)
        for name, weight in self.weights._asdict().items():
            check_number(f"the weight of {name}", weight, 0, 1e6)

    def forward(
        self, stages: Sequence[StagePrediction], targets: Sequence[BoxTarget], sizes: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted losses of all stages, over the mean number of matched proposals.

        Args:
            stages: predictions of all stages.
            targets: of the images of the batch; some or all may be without objects.
            sizes: (N, 4): width, height, width, height of the images, pixels.
        Raises: FloatingPointError that names the image if a matching cost is not finite.
        """
        relative = [stage.boxes.float() / sizes[:, None] for stage in stages]
        matches = self.match(stages, relative, targets)
        # Every stage matches the same number: that of objects, or of proposals if these are fewer.
        matched = sum(len(queries) for queries, _ in matches[0])
        count = mean_object_count(matched, sizes.device)
        losses = {}
        for k, (stage, boxes) in enumerate(zip(stages, relative, strict=True)):
            sums = set_losses(stage.logits, boxes, targets, matches[k], box_format="xyxy")
            for name, total, weight in zip(("cls", "box", "giou"), sums, self.weights, strict=True):
                losses[f"loss_{name}_stage{k}"] = weight * total / count
        return losses

    @torch.no_grad()
    def match(
        self,
        stages: Sequence[StagePrediction],
        boxes: Sequence[Tensor],
        targets: Sequence[BoxTarget],
    ) -> list[list[Match]]:
        """Match the proposals of each stage with the objects of each image.

        Args:
            boxes: of each stage, (N, Q, 4), xyxy, 0..1.
        """
        costs = [
            [
                matching_costs(
                    logits, own, target, self.weights, box_format="xyxy", epsilon=EPSILON
                )
                for logits, own, target in zip(stage.logits, relative, targets, strict=True)
            ]
            for stage, relative in zip(stages, boxes, strict=True)
        ]
        return assign(costs, [target.name for target in targets])
