"""Define the losses of RepPoints v2 that no library has.

All return sums; the caller divides.
"""

import torch
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor
from torch.nn import functional as F


def overlaps_with_own(boxes: Tensor, own: Tensor) -> Tensor:
    """Return the IoU (R,) of boxes with their objects, (R, 4), xyxy, absolute pixels.

    Predicted boxes whose sides are swapped have 0.
    """
    overlaps: Tensor = matched_pairwise_iou(Boxes(boxes), Boxes(own))
    return overlaps.nan_to_num(0.0).clamp(0, 1)


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """Return the cross-entropy with soft targets, weighted by the distance to the power of beta.

    Args:
        logits, targets: same shape; targets 0..1.
    Source: arXiv:2006.04388, equation 5.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (entropy * (targets - logits.sigmoid()).abs().pow(beta)).sum()


def gaussian_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = 2.0, gamma: float = 4.0
) -> Tensor:
    """Return the focal loss of heat maps; cells near a positive one count less.

    Args:
        logits, targets: same shape; targets 0..1, 1 at positive cells.
    Source: arXiv:1808.01244, equation 1.
    """
    scores = logits.sigmoid()
    positive = -F.logsigmoid(logits) * (1 - scores).pow(alpha)
    negative = -F.logsigmoid(-logits) * scores.pow(alpha) * (1 - targets).pow(gamma)
    return torch.where(targets == 1, positive, negative).sum()


def inclusive_giou_loss(boxes: Tensor, own: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return the sum of 1 - GIoU of boxes whose sides are one longer than the difference.

    Args:
        boxes, own: (R, 4), xyxy, in multiples of 4 strides.
    Source: Scalsol/RepPointsV2:mmdet/models/losses/iou_loss.py, after arXiv:1902.09630.
    """
    overlap = _area(
        torch.maximum(boxes[:, :2], own[:, :2]), torch.minimum(boxes[:, 2:], own[:, 2:])
    )
    areas = [(b[:, 2:] - b[:, :2] + 1).prod(dim=1) for b in (boxes, own)]
    union = areas[0] + areas[1] - overlap + epsilon
    hull = _area(torch.minimum(boxes[:, :2], own[:, :2]), torch.maximum(boxes[:, 2:], own[:, 2:]))
    hull = hull + epsilon
    return (1 - overlap / union + (hull - union) / hull).sum()


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low + 1).clamp(min=0).prod(dim=1)


def separate_focal_losses(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Return the weighted focal loss of positive cells, and that of negative cells.

    Args:
        logits, targets, weights: same shape; targets 0 or 1.
    Source: arXiv:2007.08508, section 4.2; Scalsol/RepPointsV2:mmdet/models/losses/focal_loss.py.
    """
    scores, positive = logits.sigmoid(), targets == 1
    at_positive = -F.logsigmoid(logits) * (1 - scores).pow(gamma) * weights * alpha
    at_negative = -F.logsigmoid(-logits) * scores.pow(gamma) * (1 - alpha)
    zero = torch.zeros_like(logits)
    return (
        torch.where(positive, at_positive, zero).sum(),
        torch.where(positive, zero, at_negative).sum(),
    )
