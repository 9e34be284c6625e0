"""Apply RoIAlign to all levels of a feature pyramid on CPUs.

torchvision loops over the channels of each box, forward and backward. Here a vector register holds
several channels, one call handles the boxes of all levels, and maps are read in channels-last
order, in which convolutions leave them.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.native import Library, Pooling, library


def roi_align(maps: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """Pool the features of boxes, each from the map of its level, with a C++ kernel.

    Args:
        maps: (N, C, H, W) each, float32; channels-last maps are read without a copy.
        pooling: R boxes with finite coordinates, and the index of each box's level in ``maps``.
    Returns: (R, C, size, size), channels-last; differentiable once with respect to the maps.
    Source: arXiv:1703.06870, section 3; points and weights of torchvision's ``roi_align``.
    """
    return cast(Tensor, _ROIAlign.apply(pooling, *maps))


class _ROIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooling: Pooling, *maps: Tensor) -> Tensor:
        ctx.pooling, ctx.shapes = pooling, [x.shape for x in maps]
        size = pooling.size
        out = maps[0].new_empty(len(pooling.boxes), size, size, maps[0].shape[1])
        cast(Library, library()).roi_align([_nhwc(x) for x in maps], out, pooling)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grad_maps = [gradient.new_zeros(n, h, w, c) for n, c, h, w in ctx.shapes]
        cast(Library, library()).roi_align_backward_(grad_maps, _nhwc(gradient), ctx.pooling)
        return None, *(grad_map.permute(0, 3, 1, 2) for grad_map in grad_maps)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
