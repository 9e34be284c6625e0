"""Measure how much a change of the weights changes the features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..backbones.focalnet import FocalModulation, FocalNet
from .tensor_shapes import visible_shapes


def shrinking_error(
    net: FocalNet, original: Mapping[str, Tensor], fitted: Mapping[str, Tensor]
) -> str:
    """Compare the features of a file with those after dropping levels, on one random image.

    Args:
        net: network to load; its sizes and flags are read, and it is not changed.
        original: tensors of the file, in official names.
        fitted: tensors that would be loaded.
    Returns: a sentence with the relative change of every stage in percent.
    """
    before = _features(net, visible_shapes(original), original)
    after = _features(net, visible_shapes(net.state_dict()), fitted)
    changes = [
        f"{name} {100 * float((after[name] - before[name]).norm() / before[name].norm()):.1f} %"
        for name in after
    ]
    return f"Fewer focal levels change the features, on one random image, by: {', '.join(changes)}."


@torch.no_grad()
def _features(
    net: FocalNet, shapes: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    modulation = next(m for m in net.modules() if isinstance(m, FocalModulation))
    twin = FocalNet(
        **shapes | {"layer_scale": 1.0 if shapes["layer_scale"] else None},
        post_norm=any(getattr(m, "post_norm", False) for m in net.modules()),
        normalize_modulator=modulation.normalize_modulator,
        stem_padding=int(net.patch_embed.proj.padding[0]) if shapes["conv_embed"] else 2,
        output_norm=False,
    )
    twin.load_state_dict({n: t for n, t in tensors.items() if n in twin.state_dict()})
    gray = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    features: dict[str, Tensor] = twin.eval()(gray.expand(-1, shapes["in_channels"], -1, -1))
    return features
