"""RoIAlign from the maps of a feature pyramid on CPUs.

torchvision goes through the channels of each box one by one, forward and backward; here a register
holds several of them, boxes of all levels go in one call, and maps are read as they lie behind
convolutions in channels-last order.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.native import Library, Pooling, library


def roi_align(maps: Sequence[Tensor], pooling: Pooling) -> Tensor:
    """RoIAlign of boxes, each from the map of its level, with the kernels of ``native.cpp``.

    Args:
        maps: (N, C, H, W) each, float32; read without a copy in channels-last order.
        pooling: of R boxes; coordinates are finite, levels those of ``maps``.
    Returns: (R, C, size, size) in channels-last order. It can be differentiated once, by the maps.
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
