"""Compute convolutions whose patches do not overlap as matrix products.

oneDNN's backward pass of such a convolution takes twice as long as the products and copies here:
one thread, forward and backward, milliseconds, convolution beside products: 86 / 46 (96 to 192
channels, 128 x 128), 45 / 30 (192 to 384, 64 x 64), 60 / 31 (384 to 768, 32 x 32). Forward alone
the products gain where patches are small: 14 / 5 (3 to 96 channels, stride 4, 512 x 512).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def patch_product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Convolve with a stride of the kernel's size, without padding.

    Args:
        x: (N, C, H, W), sides divisible by the stride.
        weight: (D, C, s, s).
        bias: (D,), or None.
        dtype: in which to compute and to return the result; ``x`` and parameters are kept as they
            are for the backward pass, which can run once.
    Returns: (N, H / s, W / s, D), contiguous.
    """
    product: Tensor = _PatchProduct.apply(x, weight, bias, dtype)
    return product


def _patches(x: Tensor, stride: int) -> Tensor:
    """Turn (N, C, H, W) into (N * H / s * W / s, s * s * C), a copy."""
    n, c, h, w = x.shape
    split = x.permute(0, 2, 3, 1).reshape(n, h // stride, stride, w // stride, stride, c)
    return split.transpose(2, 3).reshape(-1, stride * stride * c)


def _matrix(weight: Tensor) -> Tensor:
    """Turn (D, C, s, s) into (D, s * s * C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


class _PatchProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        n, _, h, w = x.shape
        dim, stride = weight.shape[0], weight.shape[-1]
        patches, matrix = _patches(x, stride).to(dtype), _matrix(weight).to(dtype)
        if bias is None:
            out = patches @ matrix.mT
        else:
            out = torch.addmm(bias.to(dtype), patches, matrix.mT)
        return out.view(n, h // stride, w // stride, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dim, c, stride, _ = weight.shape
        flat = gradient.reshape(-1, dim).to(ctx.dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            n, _, h, w = x.shape
            split = (flat @ _matrix(weight).to(ctx.dtype)).view(
                n, h // stride, w // stride, stride, stride, c
            )
            grad_x = split.transpose(2, 3).reshape(n, h, w, c).permute(0, 3, 1, 2).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_matrix = flat.mT @ _patches(x, stride).to(ctx.dtype)
            grad_weight = (
                grad_matrix.view(dim, stride, stride, c).permute(0, 3, 1, 2).to(weight.dtype)
            )
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None
