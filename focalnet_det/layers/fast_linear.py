"""Apply linear layers on CPUs with the fastest of several libraries."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.cpu import products
from ..ops.focal_block import policy


class FastLinear(nn.Linear):
    """``nn.Linear`` whose float32 products on CPUs are those of :mod:`..ops.cpu.products`.

    Other inputs take the base class, as do graphs that are being recorded and all inputs with
    ``FOCALNET_DET_OPS=reference`` or ``torch``. Differentiable once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (..., C)."""
        if not self._is_fast(x):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        out = cast(Tensor, _Linear.apply(flat, self.weight, self.bias))
        return out.view(*x.shape[:-1], self.out_features)

    def _is_fast(self, x: Tensor) -> bool:
        return (
            policy.supports_native([x, self.weight])
            and not torch.is_autocast_enabled("cpu")
            and x.shape[-1] == self.in_features
            and x.numel() > 0
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return products.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_x = products.multiply(gradient, weight) if ctx.needs_input_grad[0] else None
        grad_weight = products.multiply(gradient.T, x) if ctx.needs_input_grad[1] else None
        grad_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias
