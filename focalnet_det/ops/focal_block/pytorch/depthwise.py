"""Compute depthwise convolutions of NHWC maps and their gradients: stride 1, odd kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN has a fast weight gradient for kernels up to this wide, at any height.
STRIP = 3
# From this width on its input gradient takes 10 to 30 % less time than its convolution.
WIDE = 7


def depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """Cross-correlate each channel with zeros outside.

    Args:
        x: (N, H, W, C), contiguous. Seen as (N, C, H, W) it is in channels-last order, which
            convolutions read and write without a copy.
        kernel: (C, 1, k, k), odd k.
    Returns: (N, H, W, C), contiguous.
    """
    if _is_wide(x, kernel):
        return _spread(x, kernel.flip(2, 3))
    out = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
    return out.permute(0, 2, 3, 1).contiguous()


def depthwise_input_gradient(gradient: Tensor, kernel: Tensor) -> Tensor:
    """Return the gradient of :func:`depthwise` by ``x``: the taps are turned around."""
    if _is_wide(gradient, kernel):
        return _spread(gradient, kernel)
    return depthwise(gradient, kernel.flip(2, 3))


def _is_wide(x: Tensor, kernel: Tensor) -> bool:
    return x.device.type == "cpu" and kernel.shape[-1] >= WIDE


def _spread(gradient: Tensor, kernel: Tensor) -> Tensor:
    """Return the input gradient as the library computes it."""
    radius = kernel.shape[-1] // 2
    view = gradient.permute(0, 3, 1, 2)
    # The second argument gives the shape of the input, which is that of the output.
    grad_x: Tensor = torch.ops.aten.convolution_backward(
        view, view, kernel, None, [1, 1], [radius] * 2, [1, 1], False, [0, 0], len(kernel),
        [True, False, False],
    )[0]  # fmt: skip
    return grad_x.permute(0, 2, 3, 1).contiguous()


def depthwise_weight_gradient(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Return the gradient of :func:`depthwise` by ``kernel``.

    A wide kernel is cut into strips of three columns, each of which is a convolution of the map
    shifted by its place: on CPUs the sum of the strips takes a third to a fifth of the time of the
    whole, which oneDNN leaves to a generic routine.

    Args:
        x: (N, H, W, C), contiguous, the input of the convolution.
        gradient: (N, H, W, C), contiguous, by its output.
        size: k.
    Returns: (C, 1, k, k).
    """
    radius = size // 2
    gradient = gradient.permute(0, 3, 1, 2)
    if size <= STRIP or x.device.type != "cpu":
        return _weight_gradient(x.permute(0, 3, 1, 2), gradient, (size, size), (radius, radius))
    width = x.shape[2]
    strips = -(-size // STRIP)
    padded = F.pad(x, (0, 0, radius, strips * STRIP - 1 - radius)).permute(0, 3, 1, 2)
    parts = [
        _weight_gradient(
            padded[..., first : first + width + STRIP - 1], gradient, (size, STRIP), (radius, 0)
        )
        for first in range(0, strips * STRIP, STRIP)
    ]
    # The last strip may reach beyond the kernel.
    return torch.cat(parts, dim=3)[..., :size]


def _weight_gradient(
    x: Tensor, gradient: Tensor, size: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    channels = x.shape[1]
    # Only its shape is read.
    kernel = x.new_empty(1).expand(channels, 1, *size)
    gradients = torch.ops.aten.convolution_backward(
        gradient, x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], channels,
        [False, True, False],
    )  # fmt: skip
    result: Tensor = gradients[1]
    return result
