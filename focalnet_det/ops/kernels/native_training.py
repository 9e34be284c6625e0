"""The branches of a block in training, with the kernels of ``native.cpp``."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import training
from .native import LARGEST_KERNEL, MOST_LEVELS, Library, library
from .parameters import (
    Affine,
    MlpWeights,
    ModulationLayout,
    ModulationWeights,
    flatten_mlp,
    flatten_modulation,
)
from .steps import Steps
from .tiles import rows
from .training import Options, Residual, keeps_modulator, mlp_kept, modulation_kept

__all__ = [
    "mlp_backward", "mlp_forward", "mlp_kept",
    "modulation_backward", "modulation_forward", "modulation_kept",
]  # fmt: skip


class NativeSteps(Steps):
    """The same in C++, for the types of :data:`focalnet_det.ops.kernels.native.DTYPES`."""

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

    # Layers whose results are read once more here are written without their bias: a product that
    # adds one copies it to all rows before it starts.

    def linear_(self, out: Tensor, x: Tensor, layer: Affine) -> Tensor:
        torch.mm(rows(x), layer.weight.mT, out=rows(out))
        return out

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
# Values of a map up to which a branch is one call. A thread keeps memory for some 13 such maps,
# which costs no page faults the next time; larger maps go tile by tile.
LARGEST_MAP = 2**21


def modulation_forward(
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    options: Options,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`focalnet_det.ops.kernels.training.modulation_forward`."""
    if residual is None or not _one_call_modulates(x, norm, weights, valid, options):
        return training.modulation_forward(
            x, norm, weights, valid, options, steps=STEPS, residual=residual
        )
    parameters, layout = flatten_modulation(norm, weights)
    call = _Call(x, residual, parameters, modulation_kept(x, weights.kernels, options))
    call.modulation(weights, layout)
    return call.out, call.kept


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
    """See :func:`focalnet_det.ops.kernels.training.modulation_backward`."""
    if residual is None or not _one_call_modulates(x, norm, weights, valid, options):
        return training.modulation_backward(
            gradient, x, norm, weights, valid, kept, options, steps=STEPS, residual=residual
        )
    parameters, layout = flatten_modulation(norm, weights)
    call = _Call(x, residual, parameters, kept, gradient)
    call.modulation(weights, layout)
    return [call.out, *call.gradients]


def mlp_forward(
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    options: Options,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`focalnet_det.ops.kernels.training.mlp_forward`."""
    if residual is None or not _one_call_does(x, norm, options):
        return training.mlp_forward(x, norm, weights, options, steps=STEPS, residual=residual)
    parameters, eps = flatten_mlp(norm, weights)
    call = _Call(x, residual, parameters, mlp_kept(x, len(weights.fc1.weight), options))
    call.mlp(weights, eps)
    return call.out, call.kept


def mlp_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    kept: list[Tensor],
    options: Options,
    residual: Residual | None = None,
) -> list[Tensor]:
    """See :func:`focalnet_det.ops.kernels.training.mlp_backward`."""
    if residual is None or not _one_call_does(x, norm, options):
        return training.mlp_backward(
            gradient, x, norm, weights, kept, options, steps=STEPS, residual=residual
        )
    parameters, eps = flatten_mlp(norm, weights)
    call = _Call(x, residual, parameters, kept, gradient)
    call.mlp(weights, eps)
    return [call.out, *call.gradients]


def _one_call_does(x: Tensor, norm: Affine | None, options: Options) -> bool:
    """Whether ``native_branches.h`` has the branch, for maps of this size."""
    if norm is None or options.recompute or x.numel() > LARGEST_MAP:
        return False
    types = {x.dtype, options.dtype, options.stored}
    return types == {torch.float32} and STEPS.library.has_branches


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


class _Call:
    """A branch, or with ``gradient``, by its sum with the input, its backward pass, in one call.

    Attributes:
        out: the sum; the gradient by ``x``.
        kept: for the backward pass, see :mod:`.training`.
        gradients: by the parameters, float32.
    """

    def __init__(
        self,
        x: Tensor,
        residual: Residual,
        parameters: list[Tensor],
        kept: list[Tensor],
        gradient: Tensor | None = None,
    ) -> None:
        self.shape, self.kept, self.backward = x.shape, kept, gradient is not None
        self.out = torch.empty_like(x, memory_format=torch.contiguous_format)
        parameters = [p.float().contiguous() for p in parameters]
        self.gradients = [] if gradient is None else [torch.empty_like(p) for p in parameters]
        inputs = [x, residual.factors, self.out, *parameters, *kept]
        tensors = [*inputs, *([] if gradient is None else [gradient]), *self.gradients]
        self.tensors = [None if t is None else t.contiguous() for t in tensors]

    def modulation(self, weights: ModulationWeights, layout: ModulationLayout) -> None:
        """Runs focal modulation."""
        sizes = [kernel.shape[-1] for kernel in weights.kernels]
        more = keeps_modulator(weights.kernels), len(sizes), *sizes
        reals = cast(float, layout.norm_eps), float(weights.divisor)
        self._run("modulation", more, reals)

    def mlp(self, weights: MlpWeights, eps: float | None) -> None:
        """Runs the MLP."""
        self._run("mlp", (len(weights.fc1.weight),), (cast(float, eps),))

    def _run(self, name: str, more: tuple[int, ...], reals: tuple[float, ...]) -> None:
        STEPS.library.branch(name, self.tensors, (self.shape, more), reals, self.backward)
