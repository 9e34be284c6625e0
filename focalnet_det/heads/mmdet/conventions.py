"""Define modules of Mask R-CNN and RetinaNet as in mmdet, where they differ from Detectron2's.

The published FocalNet detectors were trained and evaluated with mmdet 2.11. Both libraries have the
same layers; assignment, box decoding and loss normalization differ.
Source: mmdet 2.11:mmdet/core/bbox/assigners/max_iou_assigner.py, coder/delta_xywh_bbox_coder.py,
mmdet/models/dense_heads/anchor_head.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    RetinaNet,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..empty import EmptyImageROIHeads


class MmdetMatcher(Matcher):
    """Anchor matcher that always assigns the best anchors of an object to that object.

    Detectron2 makes such an anchor positive too, but assigns it to the object that it overlaps
    most, and does so however small the overlap is.

    Args:
        thresholds, labels: as in Detectron2's ``Matcher``.
        min_low_quality_iou: smallest IoU at which the best anchor of an object is assigned to it.
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
        """Match anchors with objects.

        Args:
            match_quality_matrix: (objects, anchors), IoU.
        Returns: index of the object and label of each anchor, (anchors,) each.
        """
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        is_best = (match_quality_matrix == best) & (best >= self.min_low_quality_iou)
        # If objects share their best anchor, it is assigned to the last of them, as in mmdet.
        last = is_best.shape[0] - 1 - is_best.flip(0).to(torch.uint8).argmax(dim=0)
        assigned = is_best.any(dim=0)
        return torch.where(assigned, last, matches), labels.masked_fill(assigned, 1)


class MmdetBox2BoxTransform(Box2BoxTransform):
    """Box decoding that clamps size deltas in both directions; Detectron2 clamps growth only."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Apply deltas (N, 4k) to boxes (N, 4); return (N, 4k), xyxy, absolute pixels."""
        lowest = [-math.inf, -math.inf, *(-self.scale_clamp * w for w in self.weights[2:])]
        limits = deltas.new_tensor(lowest).repeat(deltas.shape[-1] // 4)
        return super().apply_deltas(torch.maximum(deltas, limits), boxes)


@PROPOSAL_GENERATOR_REGISTRY.register()
class MmdetRPN(RPN):
    """Detectron2's RPN with mmdet's assignment, box decoding and loss normalization."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Read the keys of Detectron2's RPN."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        rpn = cfg.MODEL.RPN
        arguments["anchor_matcher"] = MmdetMatcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS)
        arguments["box2box_transform"] = MmdetBox2BoxTransform(rpn.BBOX_REG_WEIGHTS)
        return arguments

    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors with objects, without anchors that cross the border of the image.

        This applies if ``anchor_boundary_thresh`` is 0 or more. Detectron2 ignores such anchors
        after matching, so an object whose best anchor is one of them may be left without anchors.

        Returns: labels (A,) and matched boxes (A, 4), xyxy, absolute pixels, for each image.
        """
        if self.anchor_boundary_thresh < 0:
            return super().label_and_sample_anchors(anchors, gt_instances)
        all_anchors = Boxes.cat(anchors)
        labels, boxes = [], []
        for truth in gt_instances:
            inside = all_anchors.inside_box(truth.image_size, self.anchor_boundary_thresh)
            label, matched = super().label_and_sample_anchors([all_anchors[inside]], [truth])
            labels.append(label[0].new_full((len(all_anchors),), -1))
            labels[-1][inside] = label[0]
            boxes.append(torch.zeros_like(all_anchors.tensor))
            boxes[-1][inside] = matched[0]
        return labels, boxes

    def losses(
        self,
        anchors: Any,
        pred_objectness_logits: Any,
        gt_labels: list[Tensor],
        pred_anchor_deltas: Any,
        gt_boxes: Any,
    ) -> dict[str, Tensor]:
        """Compute RPN's losses, averaged over the sampled anchors.

        Detectron2 divides by the number of anchors to sample, which an image may not have.
        """
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        sampled = sum((labels >= 0).sum() for labels in gt_labels)
        factor = self.batch_size_per_image * len(gt_labels) / torch.as_tensor(sampled).clamp(min=1)
        return {name: loss * factor for name, loss in losses.items()}


@ROI_HEADS_REGISTRY.register()
class MmdetROIHeads(EmptyImageROIHeads):
    """Detectron2's RoI heads with mmdet's box decoding."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._init_box_head(cfg, input_shape)
        weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        arguments["box_predictor"].box2box_transform = MmdetBox2BoxTransform(weights)
        return arguments


@META_ARCH_REGISTRY.register()
class MmdetRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with mmdet's assignment, loss normalization and box decoding.

    The losses are divided by the number of positive anchors of the batch (at least one per image)
    rather than by a moving average, and boxes are clipped to the image before NMS rather than after
    it. There is no ReLU before P7: see :func:`focalnet_det.necks.fpn.build_retinanet_fpn`.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys of Detectron2's RetinaNet."""
        arguments: dict[str, Any] = super().from_config(cfg)
        node = cfg.MODEL.RETINANET
        arguments["anchor_matcher"] = MmdetMatcher(
            node.IOU_THRESHOLDS, node.IOU_LABELS, min_low_quality_iou=0.0
        )
        arguments["box2box_transform"] = MmdetBox2BoxTransform(node.BBOX_REG_WEIGHTS)
        return arguments

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute RetinaNet's losses, divided by the number of positive anchors of this batch."""
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        positives = [((g >= 0) & (g != self.num_classes)).sum().item() for g in gt_labels]
        factor = max(sum(positives), 1) / sum(max(count, 1) for count in positives)
        return {name: loss * factor for name, loss in losses.items()}

    def _ema_update(self, _: str, value: float, *__: float) -> float:
        """Return the value for this batch rather than a moving average."""
        return value

    def _decode_multi_level_predictions(self, *arguments: Any) -> Instances:
        decoded = super()._decode_multi_level_predictions(*arguments)
        decoded.pred_boxes.clip(decoded.image_size)
        return decoded
