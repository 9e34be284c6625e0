"""Define Cascade R-CNN's heads as in mmdet, where they differ from Detectron2's.

The published FocalNet results of Cascade Mask R-CNN were trained and evaluated with mmdet.
Source: mmdet 2.11:mmdet/models/roi_heads/cascade_roi_head.py, bbox_heads/bbox_head.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...layers.sync_batch_norm import sync_batch_norm

Features = dict[str, Tensor]
Predictions = tuple[Tensor, Tensor]


class MmdetCascadeROIHeads(CascadeROIHeads):
    """Cascade heads with class-specific boxes, a mask head per stage, and averaged logits.

    Between two stages a box is refined by the deltas of its class: the class of the matched object
    in training, otherwise the foreground class of highest score. In training the ground-truth boxes
    are added to the proposals of every stage, which are matched and sampled again. Detectron2 has
    class-agnostic boxes and one mask head, averages probabilities, samples once, and scales the
    gradients of RoI features.

    Args:
        mask_heads: one per stage.
        stage_weights: weight of the losses of each stage.
        arguments: arguments of ``CascadeROIHeads`` without ``mask_head``; the box predictors must
            be class-specific.
    Raises: ValueError if there is not one mask head and one weight per stage.
    Source: arXiv:1712.00726; arXiv:1906.09756, section 3 (mask heads).
    """

    def __init__(
        self,
        *,
        mask_heads: Sequence[nn.Module],
        stage_weights: Sequence[float] = (1.0, 0.5, 0.25),
        **arguments: Any,
    ) -> None:
        stages = len(arguments["box_heads"])
        if not len(mask_heads) == len(stage_weights) == stages:
            raise ValueError(
                f"{stages} stages need {stages} mask heads and {stages} stage weights, got "
                f"{len(mask_heads)} and {len(stage_weights)}."
            )
        super().__init__(mask_head=nn.ModuleList(mask_heads), **arguments)
        self.stage_weights = tuple(stage_weights)
        self.proposal_append_gt = False  # _match_and_sample appends and marks them

    def forward(
        self,
        images: Any,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Predict instances, or compute losses; as ``CascadeROIHeads`` does.

        Args:
            images: not used.
            features: {name: (N, C, H, W)}.
            proposals: proposals of each image, boxes xyxy, absolute pixels.
            targets: ground truth of each image, in training.
        Returns: instances and no losses; in training the proposals and the losses, whose names end
            in ``_stage0`` and so on.
        """
        del images
        if self.training:
            assert targets is not None
            return proposals, self._losses(features, proposals, targets)
        detections = self._detect(features, proposals)
        return self.forward_with_given_boxes(features, detections), {}

    def _losses(
        self, features: Features, proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        maps = [features[name] for name in self.box_in_features]
        for stage, weight in enumerate(self.stage_weights):
            with get_event_storage().name_scope(f"stage{stage}"):
                proposals = self._match_and_sample(proposals, targets, stage)
                predictions = self._run_stage(maps, proposals, stage)
                stage_losses = dict(self.box_predictor[stage].losses(predictions, proposals))
                stage_losses |= self._mask_losses(features, proposals, stage)
            losses |= {f"{k}_stage{stage}": weight * loss for k, loss in stage_losses.items()}
            if stage + 1 < self.num_cascade_stages:
                classes = torch.cat([p.gt_classes for p in proposals])
                proposals = self._refine_proposals(predictions, proposals, stage, classes)
                proposals = [p[~p.is_ground_truth] for p in proposals]
        return losses

    def _match_and_sample(
        self, proposals: list[Instances], targets: list[Instances], stage: int
    ) -> list[Instances]:
        """Match and sample proposals and ground-truth boxes with the IoU threshold of a stage."""
        joined = []
        for boxes, truth in zip(proposals, targets, strict=True):
            candidates = Instances(boxes.image_size)
            candidates.proposal_boxes = Boxes.cat([boxes.proposal_boxes, truth.gt_boxes])
            candidates.is_ground_truth = torch.arange(
                len(candidates), device=truth.gt_boxes.device
            ) >= len(boxes)
            joined.append(candidates)
        # Read by the inherited method.
        self.proposal_matcher = self.proposal_matchers[stage]
        return self.label_and_sample_proposals(joined, targets)

    def _run_stage(
        self, features: list[Tensor], proposals: list[Instances], stage: int
    ) -> Predictions:
        """Predict logits (R, K + 1) and deltas (R, 4K) of R proposals in K classes."""
        pooled = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _refine_proposals(
        self, predictions: Predictions, proposals: list[Instances], stage: int, classes: Tensor
    ) -> list[Instances]:
        """Refine proposals for the next stage, and clip them to the image.

        Args:
            predictions: logits (R, K + 1) and deltas (R, 4K) of the stage.
            proposals: proposals of each image, R in total.
            stage: index of the stage.
            classes: (R,), class of each proposal; for background, the class of highest logit is
                used.
        """
        logits, deltas = (p.detach() for p in predictions)
        classes = torch.where(classes < self.num_classes, classes, logits[:, :-1].argmax(dim=1))
        rows = torch.arange(len(classes), device=classes.device)
        class_deltas = deltas.view(-1, self.num_classes, 4)[rows, classes]
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        refined = self.box_predictor[stage].box2box_transform.apply_deltas(class_deltas, boxes)
        result = []
        parts = refined.split([len(p) for p in proposals])
        for before, tensor in zip(proposals, parts, strict=True):
            after = Instances(before.image_size, proposal_boxes=Boxes(tensor))
            after.proposal_boxes.clip(before.image_size)
            if before.has("is_ground_truth"):
                after.is_ground_truth = before.is_ground_truth
            result.append(after)
        return result

    def _detect(self, features: Features, proposals: list[Instances]) -> list[Instances]:
        maps = [features[name] for name in self.box_in_features]
        predictions = self._run_stage(maps, proposals, 0)
        logits = [predictions[0]]
        for stage in range(1, self.num_cascade_stages):
            unknown = torch.full_like(predictions[0][:, 0], self.num_classes, dtype=torch.long)
            proposals = self._refine_proposals(predictions, proposals, stage - 1, unknown)
            predictions = self._run_stage(maps, proposals, stage)
            logits.append(predictions[0])
        scores = torch.stack(logits).mean(dim=0).softmax(dim=-1)
        last = self.box_predictor[-1]
        detections, _ = fast_rcnn_inference(
            last.predict_boxes(predictions, proposals),
            scores.split([len(p) for p in proposals]),
            [p.image_size for p in proposals],
            last.test_score_thresh,
            last.test_nms_thresh,
            last.test_topk_per_image,
        )
        return detections

    def _mask_losses(
        self, features: Features, proposals: list[Instances], stage: int
    ) -> dict[str, Tensor]:
        positives, _ = select_foreground_proposals(proposals, self.num_classes)
        maps = [features[name] for name in self.mask_in_features]
        pooled = self.mask_pooler(maps, [p.proposal_boxes for p in positives])
        losses: dict[str, Tensor] = self.mask_head[stage](pooled, positives)
        return losses

    def _forward_mask(self, features: Features, instances: list[Instances]) -> list[Instances]:
        """Add the masks, averaged over the stages, to detections."""
        maps = [features[name] for name in self.mask_in_features]
        pooled = self.mask_pooler(maps, [i.pred_boxes for i in instances])
        masks = []
        for head in self.mask_head:
            head(pooled, instances)
            masks.append([i.pred_masks for i in instances])
        for image, stage_masks in zip(instances, zip(*masks, strict=True), strict=True):
            image.pred_masks = torch.stack(stage_masks).mean(dim=0)
        return instances


def sync_bn_box_head(**arguments: Any) -> FastRCNNConvFCHead:
    """Build Detectron2's ``FastRCNNConvFCHead`` with batch norm over all processes, on any device.

    Args:
        arguments: its other arguments.
    """
    return FastRCNNConvFCHead(conv_norm=sync_batch_norm, **arguments)
