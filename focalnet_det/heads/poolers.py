"""Detectron2's RoI pooler, faster on CPUs."""

from typing import Any

from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..ops import dispatch
from ..ops.kernels.native import MOST_LEVELS, Pooling
from ..ops.roi_align import roi_align


def pool_fast(model: nn.Module) -> nn.Module:
    """Gives each ``ROIPooler`` of a model the class below; any subclass is left as it is.

    Returns: the model.
    """
    for module in model.modules():
        if type(module) is ROIPooler:
            module.__class__ = FastROIPooler
    return model


class FastROIPooler(ROIPooler):
    """``ROIPooler`` whose RoIAlign of float32 maps on CPUs takes all levels at once, in C++.

    Anything else goes to the class above it, with the same results.
    """

    def forward(self, x: list[Tensor], box_lists: list[Any]) -> Tensor:
        """As in ``ROIPooler``."""
        pooler = self.level_poolers[0]
        if not (
            x
            and box_lists
            and len(x) == len(self.level_poolers) <= MOST_LEVELS
            and isinstance(pooler, ROIAlign)
            and self.output_size[0] == self.output_size[1]
            and all(isinstance(boxes, Boxes) for boxes in box_lists)
            and dispatch.takes_native(x)
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
        # Heads of Detectron2 take views that only this order allows.
        return roi_align(x, pooling).contiguous()
