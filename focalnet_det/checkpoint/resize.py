"""Resize tensors: kernels, focal levels, image channels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """Zero-pad or crop a square kernel of odd size around its center.

    Padding does not change the result of the convolution (with "same" padding); cropping drops the
    outer taps.

    Args:
        kernel: (..., k, k), k odd.
        size: new kernel size, odd.
    Returns: (..., size, size).
    Raises: ValueError if a size is even or the kernel is not square.
    Source: microsoft/FocalNet:detection/mmcv_custom/checkpoint.py.
    """
    old = kernel.shape[-1]
    if kernel.shape[-2] != old or old % 2 == 0 or size % 2 == 0:
        raise ValueError(
            f"Only square kernels of odd size can be resized, to an odd size, got "
            f"{tuple(kernel.shape[-2:])} and {size}."
        )
    margin = (size - old) // 2
    if margin >= 0:
        return F.pad(kernel, (margin, margin, margin, margin))
    return kernel[..., -margin:margin, -margin:margin]


def resize_gates(projection: Tensor, dim: int, sources: Sequence[int | None]) -> Tensor:
    """Resize the first projection of a modulation to another number of focal levels.

    The rows of query, context and global gate do not change. A level without a source gets a gate
    of zero, so it adds nothing until it is trained.

    Args:
        projection: (2 dim + L + 1, ...), weight or bias of ``modulation.f``.
        dim: channels of the modulation.
        sources: for each new level, the index of the old level whose gate it gets, or None.
    Returns: (2 dim + len(sources) + 1, ...).
    Source: microsoft/FocalNet:detection/mmcv_custom/checkpoint.py.
    """
    gates = projection[2 * dim : -1]
    rows = [torch.zeros_like(projection[:1]) if s is None else gates[s : s + 1] for s in sources]
    return torch.cat([projection[: 2 * dim], *rows, projection[-1:]])


def identity_kernel(dim: int, size: int, like: Tensor) -> Tensor:
    """Return a depthwise kernel (dim, 1, size, size) that leaves its input unchanged.

    ``like`` gives dtype and device.
    """
    return resize_kernel(torch.ones(dim, 1, 1, 1, dtype=like.dtype, device=like.device), size)


def resize_image_channels(kernel: Tensor, channels: int) -> Tensor:
    """Resize the kernel of the stem to images with another number of channels.

    With more channels, the added ones start at zero, so nothing changes until they are trained.
    With fewer channels, each gets an equal part of the sum, so a gray image gives the same result
    as before.

    Args:
        kernel: (out, in, k, k).
        channels: new number of image channels.
    Returns: (out, channels, k, k).
    """
    old = kernel.shape[1]
    if channels >= old:
        return F.pad(kernel, (0, 0, 0, 0, 0, channels - old))
    return (kernel.sum(1, keepdim=True) / channels).expand(-1, channels, -1, -1).contiguous()
