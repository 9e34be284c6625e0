"""Fitting a tensor to another kernel size."""

import torch.nn.functional as F
from torch import Tensor


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """Centre-pads with zeros, or centre-crops, a square odd kernel.

    Growing changes nothing in the result of the convolution (with "same" padding); shrinking
    drops the outer taps.

    Args:
        kernel: (..., k, k), k odd.
        size: the new k, odd.
    Returns: (..., size, size).
    Raises: ValueError if a size is even or the kernel is not square.
    Source: microsoft/FocalNet:detection/mmcv_custom/checkpoint.py.
    """
    old = kernel.shape[-1]
    if kernel.shape[-2] != old or old % 2 == 0 or size % 2 == 0:
        raise ValueError(
            f"Kernels must be square and odd to be resized, got {tuple(kernel.shape[-2:])} "
            f"and {size}."
        )
    margin = (size - old) // 2
    if margin >= 0:
        return F.pad(kernel, (margin, margin, margin, margin))
    return kernel[..., -margin:margin, -margin:margin]
