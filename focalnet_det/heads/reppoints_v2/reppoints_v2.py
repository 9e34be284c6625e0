"""Define the meta-architecture RepPoints v2."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..atss.atss_matcher import ATSSMatcher
from ..dense import suppress_overlaps
from .reppoints_criterion import Criterion, LossWeights
from .reppoints_decode import crop_to_image, decode_boxes, snap_boxes
from .reppoints_head import Predictions, RepPointsV2Head


@META_ARCH_REGISTRY.register()
class RepPointsV2(DenseDetector):
    """Dense detector of point sets, whose boxes snap to predicted corners.

    The finest level is not snapped: boxes of the next two levels snap to its corners, those of the
    others to the corners of the second level. An image is detected on the maps that it would have
    in a batch of one, given its features.

    Args:
        backbone: with a neck; computes ``head_in_features``.
        head: see :class:`RepPointsV2Head`.
        head_in_features: names of the levels, fine to coarse, at least two; their strides are
            powers of 2.
        num_classes: K.
        matcher: matches initial boxes with objects in training.
        loss_weights: factors of the losses; None for the published ones.
        test_score_thresh: class score that a candidate must exceed.
        test_topk_candidates: largest number of candidate boxes of a level, which all classes share.
        test_nms_thresh: IoU above which the detection of lower score is dropped.
        max_detections_per_image: largest number of detections.
        pixel_mean, pixel_std: of the channels of the image, in its units.
        input_format: order of the channels.
    Source: arXiv:2007.08508; Scalsol/RepPointsV2:mmdet/models/dense_heads/reppoints_v2_head.py, as
    configured in SwinTransformer/Swin-Transformer-Object-Detection:configs/swin.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        matcher: ATSSMatcher | None = None,
        loss_weights: LossWeights | None = None,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        input_format: str = "RGB",
    ) -> None:
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in head_in_features]
        self.criterion = Criterion(
            num_classes, self.strides, matcher or ATSSMatcher(), loss_weights or LossWeights()
        )
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.REPPOINTS_V2``, and the keys of Detectron2's RetinaNet for the rest."""
        node, own = cfg.MODEL.RETINANET, cfg.MODEL.REPPOINTS_V2
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": RepPointsV2Head(
                num_classes=node.NUM_CLASSES,
                channels=backbone.output_shape()[node.IN_FEATURES[0]].channels,
                convs=own.CONVS,
                shared_convs=own.SHARED_CONVS,
                corner_channels=own.CORNER_CHANNELS,
                prior_prob=node.PRIOR_PROB,
            ),
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "matcher": ATSSMatcher(own.TOPK),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
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
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch; see :class:`Criterion`."""
        del features
        height, width = images.tensor.shape[-2:]
        return self.criterion(Predictions(*predictions), gt_instances, (height, width))

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Sequence[list[Tensor]]
    ) -> list[Instances]:
        """Detect the objects of each image."""
        del features
        divisor = max(self.backbone.size_divisibility, 1)
        results = []
        for i, size in enumerate(images.image_sizes):
            height, width = (-(-int(side) // divisor) * divisor for side in size)
            own = crop_to_image(Predictions(*predictions), i, (height, width), self.strides)
            results.append(self._detect(own, (int(size[0]), int(size[1]))))
        return results

    def _detect(self, predictions: Predictions, image_size: tuple[int, int]) -> Instances:
        """Detect the objects of one image, (height, width) without padding."""
        levels = range(len(self.strides))
        candidates = [self._select_candidates(predictions, i, image_size) for i in levels]
        boxes, scores = (torch.cat(part) for part in zip(*candidates, strict=True))
        rows, classes = (scores > self.test_score_thresh).nonzero(as_tuple=True)
        return suppress_overlaps(
            boxes[rows],
            scores[rows, classes],
            classes,
            image_size=image_size,
            nms_threshold=self.test_nms_thresh,
            limit=self.max_detections_per_image,
        )

    def _select_candidates(
        self, predictions: Predictions, level: int, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return boxes (R, 4), xyxy, pixels, and scores (R, K) of the likeliest cells."""
        logits = permute_to_N_HWA_K(predictions.logits[level], self.num_classes)[0]
        scores = logits.float().sigmoid()
        boxes = decode_boxes(predictions.refined[level], self.strides[level])[0]
        if len(scores) > self.test_topk_candidates:
            chosen = scores.amax(dim=1).topk(self.test_topk_candidates).indices
            scores, boxes = scores[chosen], boxes[chosen]
        clipped = Boxes(boxes)
        clipped.clip(image_size)
        boxes = clipped.tensor
        if level > 0:
            finer = 0 if level <= 2 else 1
            boxes = snap_boxes(boxes, predictions, finer, self.strides[finer])
        return boxes, scores
