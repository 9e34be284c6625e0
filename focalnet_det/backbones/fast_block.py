"""Run FocalNet's blocks on the fast backends of ``ops/focal_block``.

The modules in ``focalnet.py`` compute what the paper says. Here their parameters are handed, as
plain tensors, to the backend that ``ops/focal_block/policy.py`` chooses, if any can run them.
"""

from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from ..layers import DropPath, Mlp, channels_last, has_hooks
from ..ops.focal_block import autograd, policy
from ..ops.focal_block.pytorch.training import Residual
from ..ops.focal_block.weights import Affine, BlockWeights, MlpWeights, ModulationWeights

if TYPE_CHECKING:
    from .focalnet import FocalModulation, FocalNetBlock

Kind = TypeVar("Kind", bound=type[nn.Module])

# Other classes, such as adapters or quantized layers, may compute something else from the same
# parameters.
PLAIN_LAYERS: set[type[nn.Module]] = {
    nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Dropout, nn.GELU, nn.Sequential, nn.ModuleList,
    DropPath, Mlp,
}  # fmt: skip


def register_plain(kind: Kind) -> Kind:
    """Mark a class, but not its subclasses, as one that the backends know."""
    PLAIN_LAYERS.add(kind)
    return kind


def run(block: "FocalNetBlock", x: Tensor, valid: Tensor | None) -> Tensor | None:
    """Run a block on the backend of the policy; return None where that is the reference.

    Args:
        block: the block.
        x: (N, H, W, C).
        valid: (N, 1, H, W), one inside an image; or None.
    """
    backend = policy.choose_backend(
        x, exact=lambda: is_plain(block), windows=block.modulation.focal_windows
    )
    if backend == "reference":
        return None
    computing = autograd.ComputePolicy(backend, *policy.compute_dtype(x), block.lean_training)
    mask = None if valid is None else channels_last(valid).to(computing.dtype)
    if not block.training and not _needs_gradient(block, x):
        return autograd.block(x, block_weights(block), mask, computing)
    return _run_branches(block, x, mask, computing)


def _run_branches(
    block: "FocalNetBlock", x: Tensor, mask: Tensor | None, computing: autograd.ComputePolicy
) -> Tensor:
    """Run both branches with their backward passes; ``mask`` is (N, H, W, 1) or None."""
    weights = block_weights(block)
    drops = block.training and max(block.modulation.proj_drop.p, block.mlp.drop.p) > 0
    if not drops and not block.post_norm and block.gamma_1 is None:
        residual = Residual(block.drop_path.sample_scales(x, computing.stored))
        x = autograd.modulation(x, weights.norm1, weights.modulation, mask, computing, residual)
        residual = Residual(block.drop_path.sample_scales(x, computing.stored))
        return autograd.mlp(x, weights.norm2, weights.mlp, computing, residual)
    before = None if block.post_norm else weights.norm1
    branch = autograd.modulation(x, before, weights.modulation, mask, computing)
    branch = block.modulation.proj_drop(branch)
    x = block.add_branch(x, block.norm1(branch) if block.post_norm else branch, block.gamma_1)
    if drops:
        branch = block.mlp(x if block.post_norm else block.norm2(x))
    else:
        before = None if block.post_norm else weights.norm2
        branch = autograd.mlp(x, before, weights.mlp, computing)
    return block.add_branch(x, block.norm2(branch) if block.post_norm else branch, block.gamma_2)


def block_weights(block: "FocalNetBlock") -> BlockWeights:
    """Return the parameters of a block as plain tensors."""
    return BlockWeights(
        norm1=_affine(block.norm1),
        modulation=modulation_weights(block.modulation),
        gamma_1=block.gamma_1,
        norm2=_affine(block.norm2),
        mlp=MlpWeights(_affine(block.mlp.fc1), _affine(block.mlp.fc2)),
        gamma_2=block.gamma_2,
        post_norm=block.post_norm,
    )


def modulation_weights(modulation: "FocalModulation") -> ModulationWeights:
    """Return the parameters of a modulation as plain tensors; ``h`` is (C, C)."""
    layers = modulation._modules
    weight, bias = _weight_and_bias(cast(nn.Conv2d, layers["h"]))
    ln = layers.get("ln")
    return ModulationWeights(
        f=_affine(cast(nn.Linear, layers["f"])),
        h=Affine(weight.flatten(1), bias),
        proj=_affine(cast(nn.Linear, layers["proj"])),
        ln=None if ln is None else _affine(cast(nn.LayerNorm, ln)),
        kernels=[layer[0].weight for layer in modulation.focal_layers],  # type: ignore[index]
        normalize=modulation.normalize_modulator,
    )


def is_plain(block: nn.Module) -> bool:
    """Tell whether the backends compute what the layers of a block do, from parameters alone."""
    return all(child is None or _is_plain(child) for child in block._modules.values())


def _is_plain(module: nn.Module) -> bool:
    # Not `modules()`: it builds the names of all modules, and this runs at each call of a block.
    if type(module) not in PLAIN_LAYERS or has_hooks(module):
        return False
    return all(child is None or _is_plain(child) for child in module._modules.values())


def _needs_gradient(block: nn.Module, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for p in block.parameters())


def _affine(layer: nn.Linear | nn.LayerNorm) -> Affine:
    weight, bias = _weight_and_bias(layer)
    return Affine(weight, bias, layer.__dict__.get("eps", 0.0))


def _weight_and_bias(layer: nn.Linear | nn.LayerNorm | nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Read parameters directly: attribute lookup on a module takes ten times as long."""
    weight: Tensor | None = layer._parameters.get("weight")
    bias: Tensor | None = layer._parameters.get("bias")
    if weight is None:
        weight = layer.weight
    if bias is None:
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return weight, bias
