"""Apply layer norms outside the fused branches, in training with C++ kernels on CPUs."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.cpu.library import DTYPES, Library, library
from ..ops.focal_block import policy
from ..ops.focal_block.weights import Affine
from .module_hooks import has_hooks


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Return ``norm(x)``, with a C++ kernel for a stock ``nn.LayerNorm`` on a CPU.

    The kernel runs only if gradients are enabled, because it speeds up the backward pass.

    Args:
        x: (..., C).
        norm: any module, usually ``nn.LayerNorm(C)``.
    Returns: (..., C).
    """
    if torch.is_grad_enabled() and _is_plain(norm, x):
        plain = cast(nn.LayerNorm, norm)
        return cast(Tensor, _LayerNorm.apply(x, plain.weight, plain.bias, plain.eps))
    return cast(Tensor, norm(x))


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    return (
        # First: a tracer would record the operators that the other conditions call.
        policy.supports_native([x], DTYPES)
        and type(norm) is nn.LayerNorm
        and len(norm.normalized_shape) == 1
        and norm.elementwise_affine
        and norm.bias is not None
        and x.dtype == norm.weight.dtype
        and x.shape[-1] == len(norm.weight)
        and x.numel() > 0
        and not has_hooks(norm)
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, statistics = cast(Library, library()).norm(x, Affine(weight, bias, eps))
        ctx.save_for_backward(x, weight, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        grad_x = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        grad_weight, grad_bias = cast(Library, library()).norm_backward(
            gradient, x, weight, statistics, out=grad_x
        )
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None
