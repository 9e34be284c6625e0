"""Compute the losses of RepPoints v2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from ..atss.atss_matcher import ATSSMatcher, matched_targets
from ..set_prediction.assignment import mean_over_processes
from .reppoints_decode import decode_boxes
from .reppoints_head import Predictions
from .reppoints_losses import (
    gaussian_focal_loss,
    inclusive_giou_loss,
    overlaps_with_own,
    quality_focal_loss,
    separate_focal_losses,
)
from .reppoints_targets import (
    BASE_SCALE,
    CornerTargets,
    corner_targets,
    gaussian_radii,
    grid_points,
    match_points,
    semantic_targets,
)

OFFSET_BETA = 1 / 9


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses."""

    classes: float = 1.0
    initial: float = 1.0
    refined: float = 2.0
    corner_scores: float = 0.25
    corner_offsets: float = 1.0
    semantic: float = 0.1


@dataclass(frozen=True)
class BoxTargets:
    """Matched boxes of a batch.

    Attributes:
        positive: (N, A), bool.
        classes: (R,), of the objects of the positive boxes.
        boxes: (R, 4), of these objects, xyxy, absolute pixels.
    """

    positive: Tensor
    classes: Tensor
    boxes: Tensor


class Criterion:
    """The losses of a batch.

    Sums are divided by numbers of positive boxes or cells, at least one per image, or by sums of
    weights. These are averaged over all processes, so that the losses do not depend on how the
    images are spread over them; the published code does not average.

    Args:
        num_classes: K.
        strides: of the levels, powers of 2.
        matcher: matches initial boxes with objects for the refined ones.
        weights: factors of the losses.
    Source: arXiv:2007.08508; Scalsol/RepPointsV2:mmdet/models/dense_heads/reppoints_v2_head.py, as
    configured in SwinTransformer/Swin-Transformer-Object-Detection.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int],
        matcher: ATSSMatcher,
        weights: LossWeights,
    ) -> None:
        self.num_classes = num_classes
        self.strides = list(strides)
        self.matcher = matcher
        self.weights = weights

    def __call__(
        self, predictions: Predictions, truths: list[Instances], padded_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Compute the weighted losses, scalars.

        Args:
            predictions: of all levels.
            truths: objects of each image.
            padded_size: (height, width) of the padded batch, pixels.
        """
        initial, refined = (
            [decode_boxes(maps, s) for maps, s in zip(kind, self.strides, strict=True)]
            for kind in (predictions.initial, predictions.refined)
        )
        # Sums of losses and what they are divided by.
        parts = {
            **self._initial_loss(predictions, initial, truths),
            **self._refined_losses(predictions, initial, refined, truths),
            **self._corner_losses(predictions, truths),
            **self._semantic_losses(predictions, truths, padded_size),
        }
        means = mean_over_processes(torch.stack([divisor for _, divisor in parts.values()]))
        # Without objects there is nothing to divide by, and the sum is zero.
        means = torch.where(means > 0, means, 1.0)
        losses = {n: loss / d for (n, (loss, _)), d in zip(parts.items(), means, strict=True)}
        weights = self.weights
        corner_scores = (losses["top_left"] + losses["bottom_right"]) / 2
        corner_offsets = (losses["top_left_offset"] + losses["bottom_right_offset"]) / 2
        semantic = losses["semantic_positive"] + losses["semantic_negative"]
        return {
            "loss_cls": weights.classes * losses["classes"],
            "loss_box_initial": weights.initial * losses["initial"],
            "loss_box_refined": weights.refined * losses["refined"],
            "loss_corner_score": weights.corner_scores * corner_scores,
            "loss_corner_offset": weights.corner_offsets * corner_offsets,
            "loss_semantic": weights.semantic * semantic,
        }

    def _points(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the positions of the cells of each level, (A_l, 2), pixels."""
        pairs = zip(maps, self.strides, strict=True)
        return [grid_points(x.shape[-2:], stride, x.device) for x, stride in pairs]

    def _box_units(self, boxes: Sequence[Tensor]) -> Tensor:
        """Return what boxes are divided by before their loss, (A, 1), pixels."""
        pairs = zip(boxes, self.strides, strict=True)
        return torch.cat(
            [level.new_full((level.shape[1], 1), BASE_SCALE * s) for level, s in pairs]
        )

    def _collect(self, matches: Sequence[Tensor], truths: Sequence[Instances]) -> BoxTargets:
        """Join the matches (A,) of the images."""
        pairs = [
            matched_targets(own, truth, self.num_classes)
            for own, truth in zip(matches, truths, strict=True)
        ]
        classes, boxes = (torch.stack(part) for part in zip(*pairs, strict=True))
        positive = classes < self.num_classes
        return BoxTargets(positive, classes[positive], boxes[positive])

    def _box_loss(self, boxes: Sequence[Tensor], targets: BoxTargets) -> Tensor:
        joined = torch.cat(list(boxes), dim=1)
        units = self._box_units(boxes).expand(len(joined), -1, -1)[targets.positive]
        return inclusive_giou_loss(joined[targets.positive] / units, targets.boxes / units)

    def _initial_loss(
        self, predictions: Predictions, initial: list[Tensor], truths: list[Instances]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        points = self._points(predictions.logits)
        matches = [match_points(points, self.strides, t.gt_boxes.tensor) for t in truths]
        targets = self._collect(matches, truths)
        return {"initial": (self._box_loss(initial, targets), _count(targets.positive))}

    def _refined_losses(
        self,
        predictions: Predictions,
        initial: list[Tensor],
        refined: list[Tensor],
        truths: list[Instances],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        matches = [
            self.matcher([level[i].detach() for level in initial], truth.gt_boxes.tensor)
            for i, truth in enumerate(truths)
        ]
        targets = self._collect(matches, truths)
        count = _count(targets.positive)
        logits = _flatten(predictions.logits)
        qualities = torch.zeros_like(logits)
        own = torch.cat(refined, dim=1)[targets.positive].detach()
        images, rows = targets.positive.nonzero(as_tuple=True)
        qualities[images, rows, targets.classes] = overlaps_with_own(own, targets.boxes)
        return {
            "classes": (quality_focal_loss(logits, qualities), count),
            "refined": (self._box_loss(refined, targets), count),
        }

    def _corner_losses(
        self, predictions: Predictions, truths: list[Instances]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        points = self._points(predictions.corner_scores)
        scores, offsets = (
            _flatten(predictions.corner_scores),
            _flatten(predictions.corner_offsets),
        )
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for index, name in enumerate(("top_left", "bottom_right")):
            pair = slice(2 * index, 2 * index + 2)
            targets = []
            for truth in truths:
                boxes = truth.gt_boxes.tensor
                radii = gaussian_radii(boxes)
                targets.append(corner_targets(points, self.strides, boxes[:, pair], radii))
            joined = CornerTargets(*(torch.stack(part) for part in zip(*targets, strict=True)))
            positive = joined.scores == 1
            count = _count(positive)
            loss = gaussian_focal_loss(scores[..., index], joined.scores)
            offset_loss = F.smooth_l1_loss(
                offsets[..., pair][positive],
                joined.offsets[positive],
                beta=OFFSET_BETA,
                reduction="sum",
            )
            parts |= {name: (loss, count), f"{name}_offset": (offset_loss, count)}
        return parts

    def _semantic_losses(
        self, predictions: Predictions, truths: list[Instances], padded_size: tuple[int, int]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = [semantic_targets(truth, padded_size, self.num_classes) for truth in truths]
        maps, weights = (torch.stack(part) for part in zip(*pairs, strict=True))
        logits, targets, own_weights = [], [], []
        for level in predictions.semantic:
            logits.append(level.float().flatten())
            targets.append(F.interpolate(maps, level.shape[-2:], mode="nearest").flatten())
            own_weights.append(F.interpolate(weights, level.shape[-2:], mode="nearest").flatten())
        target, weight = torch.cat(targets), torch.cat(own_weights)
        positive, negative = separate_focal_losses(torch.cat(logits), target, weight)
        return {
            "semantic_positive": (positive, weight.sum()),
            "semantic_negative": (negative, target.sum()),
        }


def _flatten(maps: Sequence[Tensor]) -> Tensor:
    """Join levels (N, C, H, W) to (N, A, C), float32."""
    return torch.cat([permute_to_N_HWA_K(x.float(), x.shape[1]) for x in maps], dim=1)


def _count(positive: Tensor) -> Tensor:
    """Return the number of positive entries (N, A), at least one per image; () float32."""
    return positive.sum(dim=1).clamp(min=1).sum().float()
