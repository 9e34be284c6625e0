"""Detectron2's parts made safe for images, batches and label maps in which nothing counts."""

from typing import Any

import torch
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.roi_heads import StandardROIHeads, select_foreground_proposals
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..layers.recast import replace_modules


@SEM_SEG_HEADS_REGISTRY.register()
class FiniteSemSegFPNHead(SemSegFPNHead):
    """Semantic FPN's head with a loss of zero, not NaN, where all pixels are ignored."""

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the losses of logits (N, K, h, w) with labels (N, H, W)."""
        losses: dict[str, Tensor] = super().losses(predictions, targets)
        counted = (targets != self.ignore_value).any()
        # Without a branch, which would wait for the GPU. The graph goes on to all parameters.
        return {name: torch.where(counted, loss, 0.0) for name, loss in losses.items()}


class EmptyImageFCOS(FCOS):
    """FCOS that also trains on images without objects; that of v0.6 stops with an IndexError."""

    @torch.no_grad()
    def label_anchors(
        self, anchors: Any, gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Any]]:
        """Return the class and the box of each anchor's object, for each image.

        Where there is no object, the class is background, and the box is not read.
        """
        truths = [truth if len(truth) else _unmatched_box(truth) for truth in gt_instances]
        labels, boxes = super().label_anchors(anchors, truths)
        return labels, boxes


def _unmatched_box(truth: Instances) -> Instances:
    """Return an image with one box without area, which has no anchor inside."""
    boxes, classes = truth.gt_boxes.tensor.new_zeros(1, 4), truth.gt_classes.new_zeros(1)
    return Instances(truth.image_size, gt_boxes=Boxes(boxes), gt_classes=classes)


class EmptyImageROIHeads(StandardROIHeads):
    """R-CNN's heads whose keypoint branch logs no mean of no numbers."""

    def _forward_keypoint(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        if not (self.training and self.keypoint_on and self.keypoint_pooler is not None):
            return super()._forward_keypoint(features, instances)
        foreground, _ = select_foreground_proposals(instances, self.num_classes)
        if any(len(proposals) for proposals in foreground):
            return super()._forward_keypoint(features, instances)
        maps = [features[name] for name in self.keypoint_in_features]
        pooled = self.keypoint_pooler(maps, [p.proposal_boxes for p in foreground])
        return self.keypoint_head(pooled, foreground)


# A part of Detectron2, and what replaces it.
EMPTY_SAFE: dict[type[nn.Module], type[nn.Module]] = {
    SemSegFPNHead: FiniteSemSegFPNHead,
    FCOS: EmptyImageFCOS,
    StandardROIHeads: EmptyImageROIHeads,
}


def accept_empty_images(model: nn.Module) -> nn.Module:
    """Replace the parts of a Detectron2 model that cannot train where there is nothing to find.

    Parameters and their names stay, and so do the losses of all other images.

    Returns: the model, or what replaces it if it is an FCOS.
    """
    return replace_modules(model, EMPTY_SAFE)
