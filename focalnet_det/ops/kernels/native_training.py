"""The branches of a block in training, with the kernels of ``native.cpp``."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from . import training
from .native import LARGEST_KERNEL, MOST_LEVELS, Library, library
from .parameters import Affine
from .steps import Steps
from .tiles import rows
from .training import mlp_kept, modulation_kept

__all__ = [
    "mlp_backward", "mlp_forward", "mlp_kept",
    "modulation_backward", "modulation_forward", "modulation_kept",
]  # fmt: skip


class NativeSteps(Steps):
    """The same in C++, for the types of :data:`focalnet_det.ops.kernels.native.DTYPES`."""

    @property
    def _library(self) -> Library:
        return cast(Library, library())

    def norm(self, x: Tensor, norm: Affine | None) -> tuple[Tensor, ...]:
        return (x,) if norm is None else self._library.norm(x, norm)

    def norm_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        norm: Affine,
        statistics: Sequence[Tensor],
        out: Tensor,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._library.norm_backward(
            gradient, x, norm.weight, statistics[0], residual, out=out
        )

    def level(self, context: Tensor, kernel: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._library.level(context, kernel, valid)

    def gelu(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self._library.gelu(x, valid)

    # Layers whose results are read once more here are written without their bias: a product that
    # adds one copies it to all rows before it starts.

    def linear_(self, out: Tensor, x: Tensor, layer: Affine) -> Tensor:
        torch.mm(rows(x), layer.weight.mT, out=rows(out))
        return out

    def residual_(self, branch: Tensor, x: Tensor, layer: Affine, factors: Tensor | None) -> None:
        self._library.residual_(branch, x, layer.bias, factors)

    def gate(self, query: Tensor, q: Affine, modulator: Tensor, h: Affine) -> Tensor:
        return self._library.gate(query, q.bias, modulator, h.bias)

    def gate_backward_(
        self, gradient: Tensor, query: Tensor, q: Affine, modulator: Tensor, h: Affine
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._library.gate_backward_(gradient, query, q.bias, modulator, h.bias)

    def hidden_gelu(self, hidden: Tensor, fc1: Affine) -> Tensor:
        return self._library.gelu(hidden, bias=fc1.bias)

    def hidden_backward_(
        self, hidden: Tensor, fc1: Affine, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._library.gelu_pair_(hidden, fc1.bias, gradient)

    def gated_sum(self, contexts: list[Tensor], gates: Tensor, shared: Tensor) -> Tensor:
        if len(contexts) > MOST_LEVELS:
            return super().gated_sum(contexts, gates, shared)
        return self._library.gated_sum(contexts, gates, shared)

    def gates_gradient(self, by_sum: Tensor, contexts: list[Tensor], shared: Tensor) -> Tensor:
        return self._library.gates_gradient(by_sum, contexts, shared)

    def level_backward(
        self,
        by_aggregated: Tensor,
        gates: Tensor,
        by_after: Tensor,
        before: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(before)
        return self._library.level_backward(by_aggregated, gates, by_after, before, valid, out=out)

    def depthwise_input_gradient(self, gradient: Tensor, kernel: Tensor) -> Tensor:
        return self._library.depthwise(gradient, kernel, flip=True)

    def depthwise_weight_gradient(self, x: Tensor, gradient: Tensor, size: int) -> Tensor:
        if size > LARGEST_KERNEL:
            return super().depthwise_weight_gradient(x, gradient, size)
        return self._library.depthwise_weight_gradient(x, gradient, size)


modulation_forward = partial(training.modulation_forward, steps=NativeSteps())
modulation_backward = partial(training.modulation_backward, steps=NativeSteps())
mlp_forward = partial(training.mlp_forward, steps=NativeSteps())
mlp_backward = partial(training.mlp_backward, steps=NativeSteps())
