"""Wrap detectors so that a graph of them can be recorded."""

import torch
from detectron2.modeling import PanopticFPN
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import Tensor, nn

from ...heads.mmdet.cascade import MmdetCascadeROIHeads
from ...heads.mmdet.conventions import MmdetRetinaNet
from ...heads.mmdet.rcnn import MmdetRCNN
from .graph_models import GraphModel, Maps
from .tensor_detections import (
    Candidates,
    best_per_image,
    clip_boxes,
    concatenate,
    grid_anchors,
    is_nonempty,
    pool_levels,
    take,
    top_candidates,
)


class GraphDetector(GraphModel):
    """Base of all detectors: the images, and the form of their results."""

    has_threshold = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.outputs = ("boxes", "scores", "classes")

    @staticmethod
    def results(boxes: Tensor, scores: Tensor, classes: Tensor, exists: Tensor) -> list[Tensor]:
        """Mark the rows that hold no detection: box and score 0, class -1."""
        return [
            torch.where(exists[..., None], boxes, 0.0),
            torch.where(exists, scores, 0.0),
            torch.where(exists, classes, -1),
        ]


class GraphDenseDetector(GraphDetector):
    """RetinaNet or FCOS."""

    def forward(self, images: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        """Map images (N, C, H, W), RGB, 0..255, to D detections each.

        Returns: boxes (N, D, 4), xyxy, pixels of the input; scores (N, D); classes (N, D), -1 where
            there is no detection.
        """
        model = self.model
        height, width = images.shape[-2:]
        features = self.padded_features(self.normalized(images))
        maps = [features[name] for name in model.head_in_features]
        anchors = grid_anchors(model.anchor_generator, maps)
        levels = zip(anchors, zip(*model.head(maps), strict=True), strict=True)
        candidates = concatenate(
            [self._candidates(level, outputs, threshold) for level, outputs in levels]
        )
        if isinstance(model, MmdetRetinaNet):
            # The mmdet form clips before boxes suppress one another, Detectron2's after it.
            candidates = candidates._replace(boxes=clip_boxes(candidates.boxes, height, width))
        chosen, exists = best_per_image(
            candidates,
            group_count=model.num_classes,
            iou_threshold=model.test_nms_thresh,
            limit=model.max_detections_per_image,
        )
        boxes = clip_boxes(take(candidates.boxes, chosen), height, width)
        scores, classes = take(candidates.scores, chosen), take(candidates.groups, chosen)
        return tuple(self.results(boxes, scores, classes, exists & is_nonempty(boxes)))

    def _candidates(
        self, anchors: Tensor, level: tuple[Tensor, ...], threshold: Tensor
    ) -> Candidates:
        """Return the candidates of highest score of one feature map."""
        classes = self.model.num_classes
        scores = _rows(level[0], classes).sigmoid()
        if len(level) == 3:  # FCOS: with the centerness
            scores = torch.sqrt(scores * _rows(level[2], 1).sigmoid())
        count = scores.shape[0]
        best, indices = top_candidates(scores.flatten(1), self.model.test_topk_candidates)
        deltas = take(_rows(level[1], 4), indices // classes)
        boxes = self.model.box2box_transform.apply_deltas(
            deltas.reshape(-1, 4), anchors[indices // classes].reshape(-1, 4)
        )
        return Candidates(boxes.view(count, -1, 4), best, indices % classes, best > threshold)


def _rows(x: Tensor, values: int) -> Tensor:
    """Turn (N, A * V, H, W) into (N, H * W * A, V)."""
    count, _, height, width = x.shape
    x = x.view(count, -1, values, height, width)
    return x.permute(0, 3, 4, 1, 2).reshape(count, -1, values)


class GraphRCNN(GraphDetector):
    """Faster, Mask or Cascade R-CNN, or panoptic FPN."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__(model)
        heads = self.model.roi_heads
        self.is_cascade = isinstance(heads, CascadeROIHeads)
        if getattr(heads, "keypoint_on", False):
            raise ValueError(
                "Keypoint R-CNN cannot be exported: keypoints are read from heat maps that are "
                "resized to each box, a loop whose length and sizes depend on the detections."
            )
        if heads.mask_on:
            self.outputs += ("masks",)
        if isinstance(model, PanopticFPN):
            self.outputs += ("logits",)

    def forward(self, images: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        """Map images (N, C, H, W), RGB, 0..255, to D detections each.

        Returns: boxes (N, D, 4), xyxy, pixels of the input; scores (N, D); classes (N, D), -1 where
            there is no detection; with masks, their probabilities in the box, (N, D, S, S); of a
            panoptic FPN, semantic logits (N, K, H, W).
        """
        size = images.shape[-2:]
        features = self.padded_features(self.normalized(images))
        proposals, exist = self._proposals(features, size)
        boxes, scores, proposals = self._boxes(features, proposals, size)
        candidates, chosen, exists = self._detections(boxes, scores, exist, threshold, size)
        found = take(candidates.boxes, chosen)
        classes = take(candidates.groups, chosen)
        result = self.results(
            found,
            take(candidates.scores, chosen),
            classes,
            exists if isinstance(self.model, MmdetRCNN) else exists & is_nonempty(found),
        )
        if "masks" in self.outputs:
            result.append(self._masks(features, found, classes))
        if "logits" in self.outputs:
            logits, _ = self.model.sem_seg_head(features)
            result.append(logits[..., : size[0], : size[1]])
        return tuple(result)

    def _proposals(self, features: Maps, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the proposals (N, P, 4), and which of them exist, (N, P).

        Source: detectron2:modeling/proposal_generator/proposal_utils.py (find_top_rpn_proposals).
        """
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(maps)
        levels = []
        for number, anchors in enumerate(grid_anchors(rpn.anchor_generator, maps)):
            count = maps[number].shape[0]
            best, indices = top_candidates(
                _rows(logits[number], 1)[..., 0], rpn.pre_nms_topk[False]
            )
            boxes = rpn.box2box_transform.apply_deltas(
                take(_rows(deltas[number], 4), indices).reshape(-1, 4),
                anchors[indices].reshape(-1, 4),
            )
            boxes = clip_boxes(boxes.view(count, -1, 4), *size)
            valid = (best > -torch.inf) & is_nonempty(boxes, rpn.min_box_size)
            levels.append(Candidates(boxes, best, torch.full_like(indices, number), valid))
        candidates = concatenate(levels)
        chosen, exists = best_per_image(
            candidates,
            group_count=len(levels),
            iou_threshold=rpn.nms_thresh,
            limit=rpn.post_nms_topk[False],
        )
        return take(candidates.boxes, chosen), exists

    def _boxes(
        self, features: Maps, proposals: Tensor, size: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine and classify the proposals.

        Returns: boxes (N * P, 4 or 4K), scores (N * P, K + 1), and the proposals of the last stage.
        """
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.box_in_features]
        boxes = proposals.reshape(-1, 4)
        stages = [(heads.box_head, heads.box_predictor)]
        if self.is_cascade:
            stages = list(zip(heads.box_head, heads.box_predictor, strict=True))
        logits: list[Tensor] = []
        for number, (head, predictor) in enumerate(stages):
            if number:
                proposals = self._refined(boxes, logits[-1], proposals, size)
            pooled = pool_levels(heads.box_pooler, maps, proposals)
            output, deltas = predictor(head(pooled))
            logits.append(output)
            boxes = predictor.box2box_transform.apply_deltas(deltas, proposals.reshape(-1, 4))
        if isinstance(heads, MmdetCascadeROIHeads):
            scores = torch.stack(logits).mean(dim=0).softmax(dim=-1)
        else:
            scores = torch.stack([x.softmax(dim=-1) for x in logits]).mean(dim=0)
        return boxes, scores, proposals

    def _refined(
        self, boxes: Tensor, logits: Tensor, proposals: Tensor, size: torch.Size
    ) -> Tensor:
        """Return the proposals of the next stage, (N, P, 4)."""
        classes = boxes.shape[1] // 4
        if classes > 1:
            # The mmdet form refines a box as one of the class of highest score.
            rows = torch.arange(boxes.shape[0], device=boxes.device)
            boxes = boxes.view(-1, classes, 4)[rows, logits[:, :-1].argmax(dim=1)]
        return clip_boxes(boxes.view_as(proposals), *size)

    def _detections(
        self, boxes: Tensor, scores: Tensor, exist: Tensor, threshold: Tensor, size: torch.Size
    ) -> tuple[Candidates, Tensor, Tensor]:
        """Select detections among the boxes of each class.

        Source: detectron2:modeling/roi_heads/fast_rcnn.py (fast_rcnn_inference).
        """
        heads = self.model.roi_heads
        predictor = heads.box_predictor[-1] if self.is_cascade else heads.box_predictor
        count, proposals = exist.shape
        classes = scores.shape[1] - 1
        scores = scores[:, :-1].reshape(count, proposals, classes)
        boxes = clip_boxes(boxes.view(count, proposals, -1, 4), *size)
        boxes = boxes.expand(count, proposals, classes, 4)
        valid = exist[..., None] & (scores > threshold)
        groups = torch.arange(classes, device=boxes.device).expand(count, proposals, classes)
        candidates = Candidates(*(x.flatten(1, 2) for x in (boxes, scores, groups, valid)))
        chosen, exists = best_per_image(
            candidates,
            group_count=classes,
            iou_threshold=predictor.test_nms_thresh,
            limit=predictor.test_topk_per_image,
        )
        return candidates, chosen, exists

    def _masks(self, features: Maps, boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the mask probabilities of detections, (N, D, S, S)."""
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.mask_in_features]
        pooled = pool_levels(heads.mask_pooler, maps, boxes)
        branches = (
            list(heads.mask_head) if isinstance(heads, MmdetCascadeROIHeads) else [heads.mask_head]
        )
        rows = torch.arange(pooled.shape[0], device=boxes.device)
        masks = []
        for branch in branches:
            logits = branch.layers(pooled)
            column = classes.reshape(-1) if logits.shape[1] > 1 else torch.zeros_like(rows)
            masks.append(logits[rows, column].sigmoid())
        mean = torch.stack(masks).mean(dim=0)
        return mean.view(*boxes.shape[:2], *mean.shape[-2:])
