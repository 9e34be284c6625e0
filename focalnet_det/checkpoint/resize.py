"""Fit a tensor to another size: kernels, focal levels, image channels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """Pad with zeros, or crop, a square odd kernel around its center.

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


def resize_gates(projection: Tensor, dim: int, sources: Sequence[int | None]) -> Tensor:
    """Return the rows of the first projection of a modulation, for another number of focal levels.

    Query, context and the gate of the global context are kept. A level without a source gets a
    gate of zero, so that it adds nothing until it has learned to.

    Args:
        projection: (2 dim + L + 1, ...), weight or bias of ``modulation.f``.
        dim: channels of the modulation.
        sources: for each new level the old level whose gate it takes, or None.
    Returns: (2 dim + len(sources) + 1, ...).
    Source: microsoft/FocalNet:detection/mmcv_custom/checkpoint.py.
    """
    gates = projection[2 * dim : -1]
    rows = [torch.zeros_like(projection[:1]) if s is None else gates[s : s + 1] for s in sources]
    return torch.cat([projection[: 2 * dim], *rows, projection[-1:]])


def identity_kernel(dim: int, size: int, like: Tensor) -> Tensor:
    """Return (dim, 1, size, size), one at the center: the convolution passes its input on."""
    return resize_kernel(torch.ones(dim, 1, 1, 1, dtype=like.dtype, device=like.device), size)


def resize_image_channels(kernel: Tensor, channels: int) -> Tensor:
    """Return the stem's kernel for images with another number of channels.

    More channels: the first ones are as before and the others start at zero, so that nothing
    changes until they have been learned. Fewer channels: each takes an equal part of the sum, so
    that a grey image gives what the same grey in every channel gave.

    Args:
        kernel: (out, in, k, k).
        channels: the new ``in``.
    Returns: (out, channels, k, k).
    """
    old = kernel.shape[1]
    if channels >= old:
        return F.pad(kernel, (0, 0, 0, 0, 0, channels - old))
    return (kernel.sum(1, keepdim=True) / channels).expand(-1, channels, -1, -1).contiguous()
