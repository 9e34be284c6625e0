"""Add focal levels to a trained network without changing its outputs.

A new level follows the last one. With a gate of zero it adds nothing itself, but the global context
is the mean of the *last* level, and no kernel makes a level equal to the one before it: each ends
in a GELU, and there is no bias. (A kernel scaled down by 1e-6 keeps the GELU linear, and the next
kernel can undo it, but not the GELU of the global context. Before the first level this works, and
then one optimizer step of 1e-4 destroys the network.) So while a network with added levels trains,
its global context continues to read the old last level, and is moved to the new one gradually.
"""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.classifier import BACKBONE_PREFIX, HeadedNetwork
from ..backbones.focalnet import FocalModulation
from ..layers import channels_first, channels_last
from ..layers.recast import recast, set_submodule


class GlobalLevelModulation(FocalModulation):
    """Focal modulation whose global context reads ``global_level`` rather than the last level.

    ``global_level`` is a buffer, so checkpoints contain it. 2 means the mean of level 2, 3 that of
    level 3, and 2.25 interpolates linearly between both.
    """

    global_level: Tensor

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Modulate (N, H, W, C) as :class:`FocalModulation` does, except for the global context."""
        parts = (self.dim, self.dim, self.focal_level + 1)
        query, context, gates = (channels_first(t) for t in self.f(x).split(parts, dim=-1))
        mask = None if valid is None else valid.to(context.dtype)
        if mask is not None:
            context = context * mask
        total = torch.zeros_like(context)
        source = torch.zeros_like(context[:, :, :1, :1])
        for level, kernel in enumerate(self.focal_layers.parameters(), 1):
            size = kernel.shape[-1]
            context = F.gelu(F.conv2d(context, kernel, padding=size // 2, groups=self.dim))
            if mask is not None:
                context = context * mask
            total = total + context * gates[:, level - 1 : level]
            # Linear interpolation: the weights of two neighboring levels add up to one.
            weight = (1 - (self.global_level - level).abs()).clamp(min=0).to(context.dtype)
            source = source + weight * _mean(context, mask)
        total = total + F.gelu(source) * gates[:, -1:]
        if self.normalize_modulator:
            total = total / (self.focal_level + 1)
        x = channels_last(query * self.h(total))
        if self.ln is not None:
            x = self.ln(x)
        return self.proj_drop(self.proj(x))


def _mean(context: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return context.mean((2, 3), keepdim=True)
    return context.sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)


def set_global_level(net: nn.Module, name: str, level: float) -> None:
    """Set the level that the global context of a modulation reads.

    Args:
        net: network, in which the modulation is replaced by one with the same parameters.
        name: name of the modulation in it.
        level: between 1 and the number of levels.
    Raises: ValueError if there is no such level.
    """
    modulation = cast(FocalModulation, net.get_submodule(name))
    if not 1 <= level <= modulation.focal_level:
        raise ValueError(
            f"The global level must be between 1 and {modulation.focal_level}, got {level}."
        )
    replacement = recast(modulation, GlobalLevelModulation)
    device = modulation.f.weight.device
    replacement.register_buffer("global_level", torch.tensor(float(level), device=device))
    set_submodule(net, name, replacement)


def growing_modulations(net: nn.Module) -> Iterator[GlobalLevelModulation]:
    """Yield the modulations of a network whose global context is not yet at the last level."""
    for module in net.modules():
        if isinstance(module, GlobalLevelModulation):
            yield module


def advance_global_level(net: nn.Module, levels: float) -> None:
    """Move the global contexts of a network with added levels toward its last level.

    Call it after every optimizer step with a small number: 1e-4 takes 10,000 steps per added level.
    At the last level the network is an ordinary one, whose checkpoints any code loads.

    Args:
        net: network after ``load_pretrained(..., levels="preserving")``.
        levels: step size, in levels.
    Raises: ValueError if the step is negative.
    """
    if not levels >= 0:
        raise ValueError(f"The step of the global level must not be negative, got {levels}.")
    for name, modulation in list(net.named_modules()):
        if isinstance(modulation, GlobalLevelModulation):
            modulation.global_level += levels
            if modulation.global_level >= modulation.focal_level:
                _restore_modulation(net, name, modulation)


def _restore_modulation(net: nn.Module, name: str, modulation: GlobalLevelModulation) -> None:
    del modulation.global_level
    set_submodule(net, name, recast(modulation, FocalModulation))


def global_levels(net: nn.Module) -> dict[str, float]:
    """Return the level that the global context of each growing modulation reads, by name."""
    return {
        name: float(module.global_level)
        for name, module in net.named_modules()
        if isinstance(module, GlobalLevelModulation)
    }


def saved_global_levels(state: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the :func:`global_levels` that a state dict contains."""
    suffix = ".global_level"
    return {n.removesuffix(suffix): float(t) for n, t in state.items() if n.endswith(suffix)}


def set_global_levels(net: nn.Module, levels: Mapping[str, float]) -> None:
    """Set the level that each named modulation reads, and make all others ordinary modulations.

    Raises: ValueError if a name is not a modulation of the network, or has no such level.
    """
    modules = {n: m for n, m in net.named_modules() if isinstance(m, FocalModulation)}
    levels = _module_names(net, levels)
    for name in levels:
        if name not in modules:
            raise ValueError(
                f"{name} has a global level in the checkpoint, but is not a modulation of this "
                "network."
            )
    for name, modulation in modules.items():
        if name in levels:
            set_global_level(net, name, levels[name])
        elif isinstance(modulation, GlobalLevelModulation):
            _restore_modulation(net, name, modulation)


def _module_names(net: nn.Module, levels: Mapping[str, float]) -> dict[str, float]:
    """Rename modulations from names in state dicts, which lack the backbone of a classifier."""
    renamed = dict(levels)
    for path, module in net.named_modules():
        if isinstance(module, HeadedNetwork):
            outer = f"{path}." if path else ""
            renamed = {
                f"{outer}{BACKBONE_PREFIX}{n.removeprefix(outer)}" if n.startswith(outer) else n: v
                for n, v in renamed.items()
            }
    return renamed
