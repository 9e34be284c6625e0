"""Make Detectron2's models train on images without objects and label maps without labels."""

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
    """Semantic FPN head with a loss of zero instead of NaN if all pixels are ignored."""

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute the losses of logits (N, K, h, w) for labels (N, H, W)."""
        losses: dict[str, Tensor] = super().losses(predictions, targets)
        has_labels = (targets != self.ignore_value).any()
        # A branch would synchronize with the GPU, and leave parameters without a gradient.
        return {name: torch.where(has_labels, loss, 0.0) for name, loss in losses.items()}


class EmptyImageFCOS(FCOS):
    """FCOS that trains on images without objects, where v0.6 raises an IndexError."""

    @torch.no_grad()
    def label_anchors(
        self, anchors: Any, gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Any]]:
        """Return the class and the box of each anchor's object, for each image.

        Without an object, the class is background and the box is not used.
        """
        truths = [truth if len(truth) else _with_empty_box(truth) for truth in gt_instances]
        labels, boxes = super().label_anchors(anchors, truths)
        return labels, boxes


def _with_empty_box(truth: Instances) -> Instances:
    """Add a box without area to an image without objects: no anchor lies inside it."""
    boxes, classes = truth.gt_boxes.tensor.new_zeros(1, 4), truth.gt_classes.new_zeros(1)
    return Instances(truth.image_size, gt_boxes=Boxes(boxes), gt_classes=classes)


class EmptyImageROIHeads(StandardROIHeads):
    """Detectron2's RoI heads, whose keypoint branch also trains on batches without objects."""

    def _forward_keypoint(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        if not (self.training and self.keypoint_on and self.keypoint_pooler is not None):
            return super()._forward_keypoint(features, instances)
        foreground, _ = select_foreground_proposals(instances, self.num_classes)
        if any(len(proposals) for proposals in foreground):
            return super()._forward_keypoint(features, instances)
        # Skips the selection of proposals with visible keypoints, which logs their mean number.
        maps = [features[name] for name in self.keypoint_in_features]
        pooled = self.keypoint_pooler(maps, [p.proposal_boxes for p in foreground])
        return self.keypoint_head(pooled, foreground)


# Class of Detectron2 -> its replacement.
EMPTY_SAFE: dict[type[nn.Module], type[nn.Module]] = {
    SemSegFPNHead: FiniteSemSegFPNHead,
    FCOS: EmptyImageFCOS,
    StandardROIHeads: EmptyImageROIHeads,
}


def accept_empty_images(model: nn.Module) -> nn.Module:
    """Replace the modules of a Detectron2 model that cannot train on images without objects.

    Parameters, their names, and the losses of all other images do not change.

    Returns: the model, or its replacement if it is an FCOS.
    """
    return replace_modules(model, EMPTY_SAFE)
