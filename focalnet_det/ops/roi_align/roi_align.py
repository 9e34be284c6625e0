"""Apply RoIAlign to all levels of a feature pyramid on CPUs.

torchvision loops over the channels of each box, forward and backward. Here a vector register holds
several channels, one call handles the boxes of all levels, and maps are read in channels-last
order, in which convolutions leave them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu import structs
from ..cpu.library import Library, library


class Pooling(NamedTuple):
    """How boxes are pooled.

    Attributes:
        boxes: (R, 5), image and corners x0, y0, x1, y1, contiguous, float32.
        levels: (R,), index of each box's map, contiguous, int64.
        size: of the result.
        scales: of the maps, divided by that of the boxes.
        sampling_ratio: points along each side of a bin, 0 for one per pixel.
        aligned: whether centers of pixels lie at halves.
    """

    boxes: Tensor
    levels: Tensor
    size: int
    scales: Sequence[float]
    sampling_ratio: int
    aligned: bool


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
        _run("roi_align", [_nhwc(x) for x in maps], out, pooling)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grad_maps = [gradient.new_zeros(n, h, w, c) for n, c, h, w in ctx.shapes]
        _run("roi_align_backward", grad_maps, _nhwc(gradient), ctx.pooling)
        return None, *(grad_map.permute(0, 3, 1, 2) for grad_map in grad_maps)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _run(name: str, maps: list[Tensor], out: Tensor, pooling: Pooling) -> None:
    """Call a kernel with maps, (N, H, W, C), and results or gradients by them, (R, S, S, C)."""
    call = structs.Pyramid(
        boxes=pooling.boxes.data_ptr(), levels=pooling.levels.data_ptr(), out=out.data_ptr(),
        count=len(pooling.boxes), c=out.shape[-1], size=pooling.size,
        ratio=pooling.sampling_ratio, aligned=pooling.aligned, threads=torch.get_num_threads(),
    )  # fmt: skip
    for level, x in enumerate(maps):
        call.maps[level], call.scales[level] = x.data_ptr(), pooling.scales[level]
        call.heights[level], call.widths[level] = x.shape[1:3]
    cast(Library, library()).run(name, call)
