"""Measure how much batch padding changes the features of an image."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.stages import StagedBackbone


@dataclass(frozen=True)
class Shift:
    """Relative change of a feature map inside the image, ||padded - alone|| / ||alone||.

    Attributes:
        feature: name.
        pixels: zero padding at the right and at the bottom.
        plain: change of the published network.
        valid: change with ``valid_context``.
    """

    feature: str
    pixels: int
    plain: float
    valid: float


@torch.no_grad()
def feature_shifts(net: StagedBackbone, image: Tensor, paddings: Sequence[int]) -> list[Shift]:
    """Measure the change of every feature map for each padding.

    Args:
        net: backbone; set to eval mode.
        image: normalized, (3, H, W). Sides should be multiples of 32; otherwise padding also fills
            the border cells of the feature maps.
        paddings: pixels.
    """
    net.eval()
    before = net.valid_context
    size = [(int(image.shape[-2]), int(image.shape[-1]))]
    shifts: dict[tuple[str, int], list[float]] = {}
    try:
        for net.valid_context in (False, True):
            sizes = size if net.valid_context else None
            alone = net(image[None], sizes)
            for pixels in paddings:
                padded = net(F.pad(image[None], (0, pixels, 0, pixels)), sizes)
                for name, feature in alone.items():
                    stride = net.shapes[name].stride
                    rows, columns = (math.ceil(side / stride) for side in size[0])
                    inside = feature[..., :rows, :columns]
                    shifted = padded[name][..., :rows, :columns]
                    change = float((shifted - inside).norm() / inside.norm())
                    shifts.setdefault((name, pixels), []).append(change)
    finally:
        net.valid_context = before
    return [Shift(name, pixels, *shifts[name, pixels]) for name in alone for pixels in paddings]


@contextmanager
def extra_padding(model: nn.Module, pixels: int) -> Iterator[None]:
    """Make a Detectron2 model pad each batch by at least ``pixels`` more within the context.

    ``MmsegSegmentor`` is not supported, because it never pads.
    """
    backbone: Any = model.backbone
    divisor = max(backbone.size_divisibility, 1)

    def pad(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        bottom, right = (-(-(side + pixels) // divisor) * divisor - side for side in x.shape[-2:])
        return (F.pad(x, (0, right, 0, bottom)), *arguments[1:])

    handle = backbone.register_forward_pre_hook(pad)
    try:
        yield
    finally:
        handle.remove()
