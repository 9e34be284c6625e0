"""The branches of a block in training, with the kernels of ``native.cpp``."""

from functools import partial
from typing import cast

import torch
from torch import Tensor

from . import training
from .native import LARGEST_KERNEL, MOST_LEVELS, Library, library
from .steps import Steps
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

    def level(self, context: Tensor, kernel: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._library.level(context, kernel, valid)

    def gelu(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self._library.gelu(x, valid)

    def gelu_pair_(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return self._library.gelu_pair_(x, gradient)

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
