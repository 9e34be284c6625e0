"""UPerNet by functions alone, for tests of the head and of its checkpoints."""

import torch
from torch import Tensor
from torch.nn import functional as F


def upernet_logits(state: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """UPerNet in eval mode by functions alone, from arXiv:1807.10221 and its public code."""

    def module(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, padding=(weight.shape[-1] - 1) // 2)
        mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        scale = state[f"{name}.bn.weight"] / (var + 1e-5) ** 0.5
        bias = state[f"{name}.bn.bias"] - mean * scale
        return (x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).clamp(min=0)

    def to(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    c2, c3, c4, c5 = inputs
    pyramid = [c5]
    for p, side in enumerate((1, 2, 3, 6)):
        pooled = F.adaptive_avg_pool2d(c5, (side, side))
        pyramid.append(to(module(f"psp_modules.{p}.1", pooled), c5))
    p5 = module("bottleneck", torch.cat(pyramid, 1))
    p4 = module("lateral_convs.2", c4) + to(p5, c4)
    p3 = module("lateral_convs.1", c3) + to(p4, c3)
    p2 = module("lateral_convs.0", c2) + to(p3, c2)
    outputs = [
        module("fpn_convs.0", p2),
        to(module("fpn_convs.1", p3), p2),
        to(module("fpn_convs.2", p4), p2),
        to(p5, p2),
    ]
    fused = module("fpn_bottleneck", torch.cat(outputs, 1))
    return F.conv2d(fused, state["conv_seg.weight"], state["conv_seg.bias"])
