"""Narrow, shallow networks that keep every flag of a row of the variants table."""

from typing import Any, TypeVar

from torch import nn

from focalnet_det import create_backbone
from focalnet_det.backbones import FOCAL_TRANSFORMERS, VARIANTS, StagedBackbone

NAMES = sorted(VARIANTS)
Net = TypeVar("Net", bound=nn.Module)


def shrunk(name: str, **overrides: Any) -> StagedBackbone:
    """A variant with 8 channels and few blocks, all of its parameters random, in eval mode."""
    depths = (1, 1, 2, 1) if len(VARIANTS[name].depths) == 4 else (2,)
    small = {"embed_dim": 8, "depths": depths}
    if name in FOCAL_TRANSFORMERS:
        small["num_heads"] = (1, 2, 4, 8)
    return randomise(create_backbone(name, **{**small, **overrides})).eval()


def randomise(net: Net) -> Net:
    """Gives every parameter a weight in the result: fresh layer scales of 1e-4 would hide bugs."""
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            fan_in = parameter[0].numel() if "bias_table" not in name else 1
            nn.init.normal_(parameter, std=fan_in**-0.5)
    return net
