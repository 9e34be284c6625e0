"""Pool RoI features with a RoIAlign that is faster on CPUs than Detectron2's."""

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..compat import renamed
from ..layers.recast import replace_modules
from ..ops.cpu.structs import MOST_LEVELS
from ..ops.focal_block import policy
from ..ops.roi_align.roi_align import Pooling, roi_align


def use_fast_roi_align(model: nn.Module) -> nn.Module:
    """Replace each ``ROIPooler`` of a model by `FastROIPooler`; subclasses are left unchanged.

    Returns: the model.
    """
    return replace_modules(model, {ROIPooler: FastROIPooler})


pool_fast = renamed(
    use_fast_roi_align,
    "focalnet_det.heads.poolers.pool_fast",
    "focalnet_det.heads.poolers.use_fast_roi_align",
)


class FastROIPooler(ROIPooler):
    """``ROIPooler`` that pools float32 maps on CPUs from all levels in one C++ call.

    Other inputs are passed to the base class, with equal results. Batches without boxes work in
    graphs of ``torch.compile``, in which the base class fails.
    """

    def forward(self, x: list[Tensor], box_lists: list[Any]) -> Tensor:
        """Pool the features of R boxes.

        Args:
            x: (N, C, H, W) of each level.
            box_lists: boxes of each image, xyxy, absolute pixels.
        Returns: (R, C, S, S).
        """
        pooler = self.level_poolers[0]
        if torch.compiler.is_compiling() and not sum(len(boxes) for boxes in box_lists):
            # Depends on the maps, so that their gradients are zero rather than None.
            empty = sum(level[:0, :, :1, :1] for level in x)
            return empty + x[0].new_zeros(0, x[0].shape[1], *self.output_size)
        if not (
            x
            and box_lists
            and len(x) == len(self.level_poolers) <= MOST_LEVELS
            and isinstance(pooler, ROIAlign)
            and self.output_size[0] == self.output_size[1]
            and all(isinstance(boxes, Boxes) for boxes in box_lists)
            and policy.supports_native(x)
        ):
            return super().forward(x, box_lists)
        boxes = convert_boxes_to_pooler_format(box_lists).float().contiguous()
        if len(x) == 1:
            levels = boxes.new_zeros(len(boxes)).long()
        else:
            levels = assign_boxes_to_levels(
                box_lists,
                self.min_level,
                self.max_level,
                self.canonical_box_size,
                self.canonical_level,
            )
        scales = [level.spatial_scale for level in self.level_poolers]
        size = self.output_size[0]
        pooling = Pooling(boxes, levels, size, scales, pooler.sampling_ratio, pooler.aligned)
        # Heads of Detectron2 create views that need contiguous memory.
        return roi_align(x, pooling).contiguous()
