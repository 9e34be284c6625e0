"""Mask R-CNN's parts as mmdet has them, where they differ from Detectron2's.

The published FocalNet detectors were trained and evaluated with mmdet 2.11. The layers are the
same in both libraries; these are the differences in what is computed with them.
Source: mmdet 2.11:mmdet/core/bbox/assigners/max_iou_assigner.py, coder/delta_xywh_bbox_coder.py,
mmdet/models/dense_heads/anchor_head.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from torch import Tensor


class MmdetMatcher(Matcher):
    """Anchor assignment in which the best anchors of an object always go to that object.

    Detectron2 makes such an anchor positive too, but leaves it with the object that it overlaps
    most, and does so however small the overlap.

    Args:
        thresholds, labels: as in Detectron2's Matcher.
        min_low_quality_iou: an object whose best anchor overlaps it less gets none that way.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = (0.3, 0.7),
        labels: Sequence[int] = (0, -1, 1),
        min_low_quality_iou: float = 0.3,
    ) -> None:
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches=False)
        self.min_low_quality_iou = min_low_quality_iou

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """(objects, anchors) IoU -> index of the object and label of each anchor."""
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        is_best = (match_quality_matrix == best) & (best >= self.min_low_quality_iou)
        # Where objects share their best anchor, the last one gets it.
        last = is_best.shape[0] - 1 - is_best.flip(0).to(torch.uint8).argmax(dim=0)
        chosen = is_best.any(dim=0)
        return torch.where(chosen, last, matches), labels.masked_fill(chosen, 1)


class MmdetBox2BoxTransform(Box2BoxTransform):
    """Box decoding with log-sizes limited in both directions; Detectron2 limits enlarging only."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """(N, 4k) deltas on (N, 4) boxes -> (N, 4k) boxes, pixels."""
        weight = deltas.new_tensor(self.weights[2:]).repeat(deltas.shape[-1] // 4)
        limited = deltas.clone()
        sizes = limited.unflatten(-1, (-1, 4))[..., 2:]
        lowest = (-self.scale_clamp * weight).view(-1, 2)
        sizes.copy_(torch.maximum(sizes, lowest))
        return super().apply_deltas(limited, boxes)


@PROPOSAL_GENERATOR_REGISTRY.register()
class MmdetRPN(RPN):
    """Detectron2's RPN with mmdet's assignment, box decoding and loss normalisation."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """As in RPN; the IoU thresholds and weights come from the same keys."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        rpn = cfg.MODEL.RPN
        arguments["anchor_matcher"] = MmdetMatcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS)
        arguments["box2box_transform"] = MmdetBox2BoxTransform(rpn.BBOX_REG_WEIGHTS)
        return arguments

    def losses(
        self,
        anchors: Any,
        pred_objectness_logits: Any,
        gt_labels: list[Tensor],
        pred_anchor_deltas: Any,
        gt_boxes: Any,
    ) -> dict[str, Tensor]:
        """As in RPN, but averaged over the anchors that were sampled, not those asked for."""
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        sampled = sum((labels >= 0).sum() for labels in gt_labels)
        factor = self.batch_size_per_image * len(gt_labels) / torch.as_tensor(sampled).clamp(min=1)
        return {name: loss * factor for name, loss in losses.items()}


@ROI_HEADS_REGISTRY.register()
class MmdetROIHeads(StandardROIHeads):
    """Detectron2's heads with mmdet's box decoding."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._init_box_head(cfg, input_shape)
        weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        arguments["box_predictor"].box2box_transform = MmdetBox2BoxTransform(weights)
        return arguments
