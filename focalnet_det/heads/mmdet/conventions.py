"""Parts of Mask R-CNN and RetinaNet as mmdet has them, where they differ from Detectron2's.

The published FocalNet detectors were trained and evaluated with mmdet 2.11. The layers are the
same in both libraries; these are the differences in what is computed with them.
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
        """Return the object's index and the label of each anchor from (objects, anchors) IoU."""
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
        """Return (N, 4k) boxes, pixels, from (N, 4k) deltas on (N, 4) boxes."""
        lowest = [-math.inf, -math.inf, *(-self.scale_clamp * w for w in self.weights[2:])]
        limits = deltas.new_tensor(lowest).repeat(deltas.shape[-1] // 4)
        return super().apply_deltas(torch.maximum(deltas, limits), boxes)


@PROPOSAL_GENERATOR_REGISTRY.register()
class MmdetRPN(RPN):
    """Detectron2's RPN with mmdet's assignment, box decoding and loss normalization."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Read the keys of RPN; the IoU thresholds and weights come from the same keys."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        rpn = cfg.MODEL.RPN
        arguments["anchor_matcher"] = MmdetMatcher(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS)
        arguments["box2box_transform"] = MmdetBox2BoxTransform(rpn.BBOX_REG_WEIGHTS)
        return arguments

    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors with objects, apart from those that cross the image's border.

        With ``anchor_boundary_thresh`` of 0 or more, that is. Detectron2 ignores them after
        matching, so that an object whose best anchor is among them may be left without one.
        """
        if self.anchor_boundary_thresh < 0:
            return super().label_and_sample_anchors(anchors, gt_instances)
        every = Boxes.cat(anchors)
        labels, boxes = [], []
        for truth in gt_instances:
            inside = every.inside_box(truth.image_size, self.anchor_boundary_thresh)
            found, matched = super().label_and_sample_anchors([every[inside]], [truth])
            labels.append(found[0].new_full((len(every),), -1))
            labels[-1][inside] = found[0]
            boxes.append(torch.zeros_like(every.tensor))
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
        """Return RPN's losses, averaged over the anchors that were sampled, not those asked for."""
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        sampled = sum((labels >= 0).sum() for labels in gt_labels)
        factor = self.batch_size_per_image * len(gt_labels) / torch.as_tensor(sampled).clamp(min=1)
        return {name: loss * factor for name, loss in losses.items()}


@ROI_HEADS_REGISTRY.register()
class MmdetROIHeads(EmptyImageROIHeads):
    """Detectron2's heads with mmdet's box decoding."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._init_box_head(cfg, input_shape)
        weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        arguments["box_predictor"].box2box_transform = MmdetBox2BoxTransform(weights)
        return arguments


@META_ARCH_REGISTRY.register()
class MmdetRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with mmdet's assignment, loss normalization and box decoding.

    The losses are divided by the positives of the batch (one at least for each image) rather than
    by a moving average; boxes are clipped to the image before NMS rather than after it. Its P7 has
    no ReLU before it: see :func:`focalnet_det.necks.fpn.build_retinanet_fpn`.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys of RetinaNet; the IoU thresholds and weights come from the same keys."""
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
        """Return RetinaNet's losses, divided by the positives of this batch."""
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        positives = [((g >= 0) & (g != self.num_classes)).sum().item() for g in gt_labels]
        factor = max(sum(positives), 1) / sum(max(count, 1) for count in positives)
        return {name: loss * factor for name, loss in losses.items()}

    def _ema_update(self, _: str, value: float, *__: float) -> float:
        """Return the positives of this batch rather than a moving average."""
        return value

    def _decode_multi_level_predictions(self, *arguments: Any) -> Instances:
        decoded = super()._decode_multi_level_predictions(*arguments)
        decoded.pred_boxes.clip(decoded.image_size)
        return decoded
