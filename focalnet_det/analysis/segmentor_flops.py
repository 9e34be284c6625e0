"""Count the multiply-accumulates of a segmentor."""

from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .flops import COUNTER

__all__ = ["COUNTER", "segmentor_macs"]


def segmentor_macs(model: nn.Module, size: tuple[int, int] = (512, 2048)) -> tuple[int, int]:
    """Count the multiply-accumulates ("FLOPs" in papers) of the logits of one image.

    See ``COUNTER`` for what is counted. The auxiliary head and resizing are excluded.

    Args:
        model: a Detectron2 ``SemanticSegmentor`` on the meta device, in eval mode.
        size: (height, width) of the input, pixels; papers use 512 x 2048.
    Returns: MACs of the backbone and of the head.
    """
    x = torch.empty(1, 3, *size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as backbone:
        features = cast(nn.Module, model.backbone)(x)
    with torch.no_grad(), FlopCounterMode(display=False) as head:
        cast(nn.Module, model.sem_seg_head)(features)
    return backbone.get_total_flops() // 2, head.get_total_flops() // 2
