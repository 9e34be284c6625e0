"""Compute the branches of a block in training with the kernels in C++."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...cpu import products
from ...cpu.library import LARGEST_KERNEL, MOST_LEVELS, Library, library
from .. import policy
from ..pytorch import training
from ..pytorch.steps import Steps
from ..pytorch.tiles import rows
from ..pytorch.training import Options, Residual, mlp_kept, modulation_kept
from ..weights import Affine, MlpWeights, ModulationWeights
from . import one_call

__all__ = [
    "mlp_backward", "mlp_forward", "mlp_kept",
    "modulation_backward", "modulation_forward", "modulation_kept",
]  # fmt: skip


class NativeSteps(Steps):
    """The same in C++, for the types of :data:`focalnet_det.ops.cpu.library.DTYPES`."""

    @property
    def library(self) -> Library:
        """Return the library of this process, which must have one."""
        return cast(Library, library())

    def norm(self, x: Tensor, norm: Affine | None) -> tuple[Tensor, ...]:
        return (x,) if norm is None else self.library.norm(x, norm)

    def norm_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        norm: Affine,
        statistics: Sequence[Tensor],
        out: Tensor,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.library.norm_backward(
            gradient, x, norm.weight, statistics[0], residual, out=out
        )

    def level(self, context: Tensor, kernel: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.library.level(context, kernel, valid)

    def gelu(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.library.gelu(x, valid)

    def linear(self, x: Tensor, layer: Affine) -> Tensor:
        if x.dtype != torch.float32 or layer.weight.dtype != torch.float32:
            return super().linear(x, layer)
        return products.linear(rows(x), layer.weight, layer.bias).view(*x.shape[:-1], -1)

    # Layers whose results are read once more here are written without their bias: a product that
    # adds one copies it to all rows before it starts.

    def linear_(self, out: Tensor, x: Tensor, layer: Affine) -> Tensor:
        self.product(rows(x), layer.weight.mT, rows(out))
        return out

    def product(
        self, a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False
    ) -> Tensor:
        if a.dtype == b.dtype == torch.float32:
            return products.multiply(a, b, out, add=add)
        return super().product(a, b, out, add=add)

    def residual_(self, branch: Tensor, x: Tensor, layer: Affine, factors: Tensor | None) -> None:
        self.library.residual_(branch, x, layer.bias, factors)

    def gate(self, query: Tensor, q: Affine, modulator: Tensor, h: Affine) -> Tensor:
        return self.library.gate(query, q.bias, modulator, h.bias)

    def gate_backward_(
        self, gradient: Tensor, query: Tensor, q: Affine, modulator: Tensor, h: Affine
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.library.gate_backward_(gradient, query, q.bias, modulator, h.bias)

    def hidden_gelu(self, hidden: Tensor, fc1: Affine) -> Tensor:
        return self.library.gelu(hidden, bias=fc1.bias)

    def hidden_backward_(
        self, hidden: Tensor, fc1: Affine, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.library.gelu_pair_(hidden, fc1.bias, gradient)

    def gated_sum(self, contexts: list[Tensor], gates: Tensor, shared: Tensor) -> Tensor:
        if len(contexts) > MOST_LEVELS:
            return super().gated_sum(contexts, gates, shared)
        return self.library.gated_sum(contexts, gates, shared)

    def gates_gradient(self, grad_sum: Tensor, contexts: list[Tensor], shared: Tensor) -> Tensor:
        return self.library.gates_gradient(grad_sum, contexts, shared)

    def level_backward(
        self,
        grad_aggregated: Tensor,
        gates: Tensor,
        grad_after: Tensor,
        before: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(before)
        return self.library.level_backward(
            grad_aggregated, gates, grad_after, before, valid, out=out
        )

    def depthwise_input_gradient(self, gradient: Tensor, kernel: Tensor) -> Tensor:
        return self.library.depthwise(gradient, kernel, flip=True)

    def depthwise_weight_gradient(self, x: Tensor, gradient: Tensor, size: int) -> Tensor:
        if size > LARGEST_KERNEL:
            return super().depthwise_weight_gradient(x, gradient, size)
        return self.library.depthwise_weight_gradient(x, gradient, size)


STEPS = NativeSteps()


def modulation_forward(
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    options: Options,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the branch, see :func:`...pytorch.training.modulation_forward`."""
    if residual is None or not _one_call_modulates(x, norm, weights, valid, options):
        return training.modulation_forward(
            x, norm, weights, valid, options, steps=STEPS, residual=residual
        )
    kept = modulation_kept(x, weights.kernels, options)
    return one_call.modulation(x, cast(Affine, norm), weights, residual, kept).out, kept


def modulation_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    kept: list[Tensor],
    options: Options,
    residual: Residual | None = None,
) -> list[Tensor]:
    """Compute the branch, see :func:`...pytorch.training.modulation_backward`."""
    if residual is None or not _one_call_modulates(x, norm, weights, valid, options):
        return training.modulation_backward(
            gradient, x, norm, weights, valid, kept, options, steps=STEPS, residual=residual
        )
    call = one_call.modulation(x, cast(Affine, norm), weights, residual, kept, gradient)
    return [call.out, *call.gradients]


def mlp_forward(
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    options: Options,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the branch, see :func:`...pytorch.training.mlp_forward`."""
    if residual is None or not _one_call_does(x, norm, options):
        return training.mlp_forward(x, norm, weights, options, steps=STEPS, residual=residual)
    kept = mlp_kept(x, len(weights.fc1.weight), options)
    return one_call.mlp(x, cast(Affine, norm), weights, residual, kept).out, kept


def mlp_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    kept: list[Tensor],
    options: Options,
    residual: Residual | None = None,
) -> list[Tensor]:
    """Compute the branch, see :func:`...pytorch.training.mlp_backward`."""
    if residual is None or not _one_call_does(x, norm, options):
        return training.mlp_backward(
            gradient, x, norm, weights, kept, options, steps=STEPS, residual=residual
        )
    call = one_call.mlp(x, cast(Affine, norm), weights, residual, kept, gradient)
    return [call.out, *call.gradients]


def _one_call_does(x: Tensor, norm: Affine | None, options: Options) -> bool:
    """Tell whether a branch of this size is one call, see :mod:`.one_call`."""
    if norm is None or options.recompute or x.numel() > policy.LARGEST_MAP:
        return False
    types = {x.dtype, options.dtype, options.stored}
    return types == {torch.float32}


def _one_call_modulates(
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    options: Options,
) -> bool:
    if valid is not None or weights.ln is not None or not _one_call_does(x, norm, options):
        return False
    sizes = [kernel.shape[-1] for kernel in weights.kernels]
    return 0 < len(sizes) <= MOST_LEVELS and max(sizes) <= LARGEST_KERNEL
