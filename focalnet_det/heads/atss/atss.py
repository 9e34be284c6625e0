"""Define the meta-architecture ATSS."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from ..dense import suppress_overlaps
from ..mmdet.conventions import MmdetBox2BoxTransform
from ..set_prediction.assignment import mean_object_count
from .atss_head import ATSSHead
from .atss_matcher import ATSSMatcher, matched_targets


@META_ARCH_REGISTRY.register()
class ATSS(DenseDetector):
    """Dense detector with one anchor per location, matched by adaptive sample selection.

    All boxes are decoded before the box loss, without clipping. Scores are the products of class
    score and centerness; candidates are selected by class score alone.

    Args:
        backbone: with a neck; computes ``head_in_features``.
        head: predicts class logits, box deltas and centerness for each level.
        head_in_features: names of the levels, fine to coarse.
        anchor_generator: gives one anchor per location.
        box2box_transform: decodes box deltas.
        anchor_matcher: matches anchors with objects.
        num_classes: K.
        box_loss_weight: factor of the GIoU loss.
        focal_loss_alpha, focal_loss_gamma: of the focal loss of the classes.
        test_score_thresh: class score that a candidate must exceed.
        test_topk_candidates: largest number of candidates of a level.
        test_nms_thresh: IoU above which the detection of lower score is dropped.
        max_detections_per_image: largest number of detections.
        pixel_mean, pixel_std: of the channels of the image, in its units.
        input_format: order of the channels.
    Source: arXiv:1912.02424; open-mmlab/mmdetection (3.3):mmdet/models/dense_heads/atss_head.py.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: ATSSMatcher,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        box_loss_weight: float = 2.0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        input_format: str = "RGB",
    ) -> None:
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.num_classes = num_classes
        self.box_loss_weight = box_loss_weight
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.ATSS``, and the keys of Detectron2's RetinaNet for what both have."""
        node = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": ATSSHead(
                input_shape=shapes,
                num_classes=node.NUM_CLASSES,
                conv_dims=[shapes[0].channels] * node.NUM_CONVS,
                norm=node.NORM,
                prior_prob=node.PRIOR_PROB,
            ),
            "head_in_features": node.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": MmdetBox2BoxTransform(node.BBOX_REG_WEIGHTS),
            "anchor_matcher": ATSSMatcher(cfg.MODEL.ATSS.TOPK),
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "box_loss_weight": cfg.MODEL.ATSS.BOX_LOSS_WEIGHT,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], ...],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch; see :meth:`losses`."""
        del images
        logits, deltas, centerness = self._flatten(predictions)
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(Boxes.cat(anchors).tensor, logits, deltas, centerness, labels, boxes)

    def _flatten(self, predictions: tuple[list[Tensor], ...]) -> list[Tensor]:
        """Join the levels: logits (N, A, K), deltas (N, A, 4) and centerness logits (N, A)."""
        levels = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        logits, deltas, centerness = (torch.cat(maps, dim=1) for maps in levels)
        return [logits, deltas, centerness.squeeze(-1)]

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match the anchors with the objects of each image.

        Args:
            anchors: anchors of each level.
            gt_instances: objects of each image.
        Returns: classes (A,), K for the background, and boxes (A, 4), xyxy, absolute pixels, of
            each image.
        """
        levels = [level.tensor for level in anchors]
        labels, boxes = [], []
        for truth in gt_instances:
            matches = self.anchor_matcher(levels, truth.gt_boxes.tensor)
            label, box = matched_targets(matches, truth, self.num_classes)
            labels.append(label)
            boxes.append(box)
        return labels, boxes

    def losses(
        self,
        anchors: Tensor,
        logits: Tensor,
        deltas: Tensor,
        centerness: Tensor,
        labels: list[Tensor],
        boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Classes and centerness are divided by the number of positive anchors, at least one per
        image, and boxes by the sum of their centerness; both are averaged over all processes.

        Args:
            anchors: (A, 4), xyxy, absolute pixels.
            logits, deltas: (N, A, K) and (N, A, 4).
            centerness: (N, A), logits.
            labels, boxes: (A,) and (A, 4) of each image, see :meth:`label_anchors`.
        Returns: scalars ``loss_cls``, ``loss_box_reg`` and ``loss_centerness``.
        """
        classes = torch.stack(labels)
        positive = classes < self.num_classes
        count = sum(max(int(image.sum()), 1) for image in positive)
        mean_count = mean_object_count(count, logits.device)
        one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
        loss_cls = sigmoid_focal_loss(
            logits, one_hot, self.focal_loss_alpha, self.focal_loss_gamma, reduction="sum"
        )
        own_anchors = anchors.expand(len(labels), -1, -1)[positive]
        own_boxes = torch.stack(boxes)[positive]
        targets = centerness_targets(own_anchors, own_boxes)
        loss_centerness = F.binary_cross_entropy_with_logits(
            centerness[positive].float(), targets, reduction="sum"
        )
        return {
            "loss_cls": loss_cls / mean_count,
            "loss_box_reg": self._box_loss(own_anchors, deltas[positive], own_boxes, targets),
            "loss_centerness": loss_centerness / mean_count,
        }

    def _box_loss(self, anchors: Tensor, deltas: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of 1 - GIoU of R decoded boxes, weighted by their centerness (R,)."""
        decoded = self.box2box_transform.apply_deltas(deltas, anchors)
        loss = (weights * generalized_box_iou_loss(decoded, boxes)).sum()
        total = mean_object_count(float(weights.sum()), weights.device)
        return self.box_loss_weight * loss / total

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: tuple[list[Tensor], ...]
    ) -> list[Instances]:
        """Detect the objects of each image; boxes are clipped to the image before NMS."""
        levels = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        results = []
        for i, size in enumerate(images.image_sizes):
            found = [
                self._select_candidates(own.tensor, logits[i], deltas[i], centerness[i, :, 0])
                for own, logits, deltas, centerness in zip(anchors, *levels, strict=True)
            ]
            boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
            results.append(
                suppress_overlaps(
                    boxes,
                    scores,
                    classes,
                    image_size=size,
                    nms_threshold=self.test_nms_thresh,
                    limit=self.max_detections_per_image,
                )
            )
        return results

    def _select_candidates(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, centerness: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (R, 4), scores and classes (R,) of the highest class scores of a level."""
        class_scores = logits.float().sigmoid()
        rows, classes = (class_scores > self.test_score_thresh).nonzero(as_tuple=True)
        chosen, order = class_scores[rows, classes].sort(descending=True)
        order = order[: self.test_topk_candidates]
        rows, classes = rows[order], classes[order]
        boxes = self.box2box_transform.apply_deltas(deltas[rows], anchors[rows])
        return boxes, chosen[: len(order)] * centerness[rows].float().sigmoid(), classes


def centerness_targets(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return how central anchors are in the boxes of their objects, (R,), 0..1.

    Args:
        anchors, boxes: (R, 4), xyxy, absolute pixels; the centers of the anchors lie inside the
            boxes.
    Source: arXiv:1904.01355, equation 3.
    """
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centers - boxes[:, :2], boxes[:, 2:] - centers
    ratios = torch.minimum(before, after) / torch.maximum(before, after)
    return ratios.prod(dim=1).sqrt()
