"""Boxes as numbers: logits, and the generalized IoU of DINO's published codes."""

import torch
from torch import Tensor
from torchvision.ops import box_convert


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized IoU, (...), of boxes (..., 4) and others that broadcast to them.

    Args:
        boxes, others: xyxy, in any unit in which 1e-6 is a small area.
    Source: arXiv:1902.09630; with 1e-6 added to both denominators, as in IDEA-Research/DINO:
    util/box_ops.py and IDEA-Research/detrex:detrex/layers/box_ops.py, which counts for small boxes.
    """
    areas = [
        (b[..., 2] - b[..., 0]).clamp(min=0) * (b[..., 3] - b[..., 1]).clamp(min=0)
        for b in (boxes, others)
    ]
    inner = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(
        boxes[..., :2], others[..., :2]
    )
    outer = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(
        boxes[..., :2], others[..., :2]
    )
    overlap = inner.clamp(min=0).prod(-1)
    union = areas[0] + areas[1] - overlap
    hull = outer.clamp(min=0).prod(-1)
    return overlap / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def pairwise_generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized IoU of all pairs, (Q, 4) and (M, 4), xyxy -> (Q, M)."""
    return generalized_iou(boxes[:, None], others)


def generalized_iou_loss(boxes: Tensor, wanted: Tensor) -> Tensor:
    """Return the sum of 1 - generalized IoU of boxes, (M, 4) each, xyxy."""
    return (1 - generalized_iou(boxes, wanted)).sum()


def to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes from cxcywh to xyxy, (..., 4)."""
    return box_convert(boxes, "cxcywh", "xyxy")


def to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes from xyxy to cxcywh, (..., 4)."""
    return box_convert(boxes, "xyxy", "cxcywh")


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Return the logits of numbers, which are clamped to a distance of ``eps`` from 0 and 1."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
