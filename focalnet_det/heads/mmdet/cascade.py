"""Cascade R-CNN's heads as mmdet has them, where they differ from Detectron2's.

The published FocalNet result of Cascade Mask R-CNN was trained and evaluated with these.
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
    """Class-specific boxes, a mask head per stage, and logits averaged before the softmax.

    Between two stages a box is moved by the deltas of its class: of its object in training, else of
    the foreground class of highest score. In training the objects' own boxes join the proposals of
    every stage, which are matched and sampled anew. Detectron2 has boxes without class, one mask
    head, averages probabilities, samples once, and scales the gradients of RoI features.

    Args:
        mask_heads: one per stage.
        stage_weights: of the losses of each stage.
        arguments: of ``CascadeROIHeads``, without ``mask_head``; predictors are class-specific.
    Raises: ValueError if there is not one of each per stage.
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
                f"{stages} stages need as many mask heads and weights, got {len(mask_heads)} and "
                f"{len(stage_weights)}."
            )
        super().__init__(mask_head=nn.ModuleList(mask_heads), **arguments)
        self.stage_weights = tuple(stage_weights)
        self.proposal_append_gt = False  # _match_and_sample does, and marks them

    def forward(
        self,
        images: Any,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return what ``CascadeROIHeads`` does; loss names end in ``_stage0``, ..."""
        del images
        if self.training:
            assert targets is not None
            return proposals, self._losses(features, proposals, targets)
        found = self._detect(features, proposals)
        return self.forward_with_given_boxes(features, found), {}

    def _losses(
        self, features: Features, proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        maps = [features[name] for name in self.box_in_features]
        for stage, weight in enumerate(self.stage_weights):
            with get_event_storage().name_scope(f"stage{stage}"):
                proposals = self._match_and_sample(proposals, targets, stage)
                predictions = self._run_stage(maps, proposals, stage)
                found = dict(self.box_predictor[stage].losses(predictions, proposals))
                found |= self._mask_losses(features, proposals, stage)
            losses |= {f"{name}_stage{stage}": weight * loss for name, loss in found.items()}
            if stage + 1 < self.num_cascade_stages:
                classes = torch.cat([p.gt_classes for p in proposals])
                proposals = self._refine_proposals(predictions, proposals, stage, classes)
                proposals = [p[~p.is_truth] for p in proposals]
        return losses

    def _match_and_sample(
        self, proposals: list[Instances], targets: list[Instances], stage: int
    ) -> list[Instances]:
        """Match and sample proposals and the objects' boxes with this stage's IoU."""
        joined = []
        for boxes, truth in zip(proposals, targets, strict=True):
            candidates = Instances(boxes.image_size)
            candidates.proposal_boxes = Boxes.cat([boxes.proposal_boxes, truth.gt_boxes])
            candidates.is_truth = torch.arange(
                len(candidates), device=truth.gt_boxes.device
            ) >= len(boxes)
            joined.append(candidates)
        # The inherited method matches with this one.
        self.proposal_matcher = self.proposal_matchers[stage]
        return self.label_and_sample_proposals(joined, targets)

    def _run_stage(
        self, features: list[Tensor], proposals: list[Instances], stage: int
    ) -> Predictions:
        """Return (R, classes + 1) logits and (R, 4 classes) deltas."""
        pooled = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _refine_proposals(
        self, predictions: Predictions, proposals: list[Instances], stage: int, classes: Tensor
    ) -> list[Instances]:
        """Return the proposals of the next stage, clipped to the image.

        Args:
            classes: (R,), of each proposal; where it is background, that of highest logit.
        """
        logits, deltas = (p.detach() for p in predictions)
        classes = torch.where(classes < self.num_classes, classes, logits[:, :-1].argmax(dim=1))
        rows = torch.arange(len(classes), device=classes.device)
        own = deltas.view(-1, self.num_classes, 4)[rows, classes]
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        moved = self.box_predictor[stage].box2box_transform.apply_deltas(own, boxes)
        result = []
        parts = moved.split([len(p) for p in proposals])
        for before, tensor in zip(proposals, parts, strict=True):
            after = Instances(before.image_size, proposal_boxes=Boxes(tensor))
            after.proposal_boxes.clip(before.image_size)
            if before.has("is_truth"):
                after.is_truth = before.is_truth
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
        found, _ = fast_rcnn_inference(
            last.predict_boxes(predictions, proposals),
            scores.split([len(p) for p in proposals]),
            [p.image_size for p in proposals],
            last.test_score_thresh,
            last.test_nms_thresh,
            last.test_topk_per_image,
        )
        return found

    def _mask_losses(
        self, features: Features, proposals: list[Instances], stage: int
    ) -> dict[str, Tensor]:
        positives, _ = select_foreground_proposals(proposals, self.num_classes)
        maps = [features[name] for name in self.mask_in_features]
        pooled = self.mask_pooler(maps, [p.proposal_boxes for p in positives])
        losses: dict[str, Tensor] = self.mask_head[stage](pooled, positives)
        return losses

    def _forward_mask(self, features: Features, instances: list[Instances]) -> list[Instances]:
        """Add the mean of the stages' masks to detections."""
        maps = [features[name] for name in self.mask_in_features]
        pooled = self.mask_pooler(maps, [i.pred_boxes for i in instances])
        masks = []
        for head in self.mask_head:
            head(pooled, instances)
            masks.append([i.pred_masks for i in instances])
        for image, of_stages in zip(instances, zip(*masks, strict=True), strict=True):
            image.pred_masks = torch.stack(of_stages).mean(dim=0)
        return instances


def sync_bn_box_head(**arguments: Any) -> FastRCNNConvFCHead:
    """Build Detectron2's box head with batch norm over all processes, on any device."""
    return FastRCNNConvFCHead(conv_norm=sync_batch_norm, **arguments)
