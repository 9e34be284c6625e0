"""Matching costs and losses of detectors that predict a set of boxes."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import (
    box_convert,
    generalized_box_iou,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from .assignment import Match

# Of the focal loss and of the matching cost.
ALPHA, GAMMA = 0.25, 2.0
# Format in which boxes are compared by L1.
BoxFormat = Literal["xyxy", "cxcywh"]
# Generalized IoU of all pairs of boxes, (Q, 4) and (M, 4), xyxy -> (Q, M).
PairwiseOverlap = Callable[[Tensor, Tensor], Tensor]
# Sum of 1 - generalized IoU of boxes, (M, 4) and (M, 4), xyxy.
OverlapLoss = Callable[[Tensor, Tensor], Tensor]


class BoxTarget(NamedTuple):
    """The objects of an image.

    Attributes:
        labels: int64 (M,), classes.
        boxes: (M, 4), xyxy, relative to the image without batch padding, 0..1.
        name: of the image, for messages.
    """

    labels: Tensor
    boxes: Tensor
    name: str = "without a file name"


class BoxPrediction(NamedTuple):
    """Classes and boxes of a set of queries.

    Attributes:
        logits: (N, Q, K).
        boxes: (N, Q, 4), in the format of the detector.
    """

    logits: Tensor
    boxes: Tensor


class BoxWeights(NamedTuple):
    """Factors of the terms of a matching cost or of a loss."""

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


class SetLosses(NamedTuple):
    """Sums of the losses of a layer over the queries of a batch, before weights and division."""

    classes: Tensor
    l1: Tensor
    giou: Tensor


def focal_costs(logits: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """Return what the focal loss changes if a query has the class of an object, (Q, M).

    Args:
        logits: (Q, K).
        labels: int64 (M,).
        epsilon: added to probabilities before the logarithm.
    Source: arXiv:2011.12450, section 3.2; the difference of both terms is that of the published
        code of DETR's successors.
    """
    probability = logits.float().sigmoid()[:, labels]
    positive = ALPHA * (1 - probability) ** GAMMA * -(probability + epsilon).log()
    negative = (1 - ALPHA) * probability**GAMMA * -(1 - probability + epsilon).log()
    return positive - negative


def summed_overlap_loss(boxes: Tensor, wanted: Tensor) -> Tensor:
    """Return the sum of 1 - generalized IoU by torchvision."""
    return generalized_box_iou_loss(boxes, wanted, reduction="sum")


def matching_costs(
    logits: Tensor,
    boxes: Tensor,
    target: BoxTarget,
    weights: BoxWeights,
    *,
    box_format: BoxFormat,
    epsilon: float,
    overlap: PairwiseOverlap = generalized_box_iou,
) -> Tensor:
    """Return the costs of assigning each query to each object of an image, (Q, M), float32.

    Args:
        logits: (Q, K).
        boxes: (Q, 4), xyxy, in the units of the target.
        box_format: of the L1 distance, a sum over four numbers.
        epsilon: see `focal_costs`.
        overlap: generalized IoU; published codes guard its quotients in different ways.
    """
    boxes, wanted = boxes.float(), target.boxes.float()
    ours, theirs = (box_convert(x, "xyxy", box_format) for x in (boxes, wanted))
    by_class = focal_costs(logits, target.labels, epsilon=epsilon)
    by_distance = torch.cdist(ours, theirs, p=1)
    by_overlap = -overlap(boxes, wanted)
    return weights.classes * by_class + weights.l1 * by_distance + weights.giou * by_overlap


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[BoxTarget],
    matches: Sequence[Match],
    *,
    box_format: BoxFormat,
    overlap_loss: OverlapLoss = summed_overlap_loss,
) -> SetLosses:
    """Return the focal loss of all queries, and L1 and GIoU losses of the matched ones, summed.

    Args:
        logits: (N, Q, K); queries without an object have no class.
        boxes: (N, Q, 4), xyxy, in the units of the targets.
        targets, matches: of each image; all may be empty, and then the losses of boxes are zeros
            with a gradient.
        box_format: of the L1 distance, a sum over four numbers.
        overlap_loss: see `matching_costs`.
    """
    logits, boxes = logits.float(), boxes.float()
    wanted = torch.zeros_like(logits)
    for i, (target, (queries, objects)) in enumerate(zip(targets, matches, strict=True)):
        wanted[i, queries, target.labels[objects]] = 1
    by_class = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA, reduction="sum")
    matched = torch.cat([b[queries] for b, (queries, _) in zip(boxes, matches, strict=True)])
    truth = torch.cat(
        [t.boxes[objects] for t, (_, objects) in zip(targets, matches, strict=True)]
    ).to(matched)
    if not len(matched):
        return SetLosses(by_class, boxes.sum() * 0, boxes.sum() * 0)
    ours, theirs = (box_convert(x, "xyxy", box_format) for x in (matched, truth))
    return SetLosses(
        by_class,
        F.l1_loss(ours, theirs, reduction="sum"),
        overlap_loss(matched, truth),
    )
