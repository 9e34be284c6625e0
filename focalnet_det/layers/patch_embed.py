"""Embed patches: the stem of a focal network, and the downsampling between its stages."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..ops.cpu.patches import patch_product
from ..ops.focal_block import policy
from .layer_norm import layer_norm
from .memory_format import channels_last
from .module_hooks import has_hooks


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad (N, C, H, W) at the right and bottom to a multiple of ``multiple`` pixels."""
    height, width = x.shape[2:]
    # Not `-height % multiple`: here the symbolic height of a dynamic graph cancels in the padded
    # size, which keeps the sizes of later stages short and compilation fast.
    pad_bottom = (height + multiple - 1) // multiple * multiple - height
    pad_right = (width + multiple - 1) // multiple * multiple - width
    # A graph must not depend on the size it was recorded with; eagerly, an empty pad is a copy.
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if recording or pad_bottom or pad_right:
        return F.pad(x, (0, pad_right, 0, pad_bottom))
    return x


def valid_mask(image_sizes: Sequence[tuple[int, int]], stride: int, like: Tensor) -> Tensor:
    """Compute a mask of the cells of a batched feature map that belong to an image.

    Args:
        image_sizes: (height, width) of each image, pixels.
        stride: stride of the feature map; an image covers ceil(height / stride) rows.
        like: (N, C, H, W), the feature map, or a tensor of its size, device and dtype.
    Returns: (N, 1, H, W), one inside an image and zero in the padding, dtype of ``like``.
    Raises: ValueError if the number of sizes is not N or a size exceeds the map.
    """
    count, _, height, width = like.shape
    if len(image_sizes) != count:
        raise ValueError(f"image_sizes has {len(image_sizes)} entries for a batch of {count}.")
    if isinstance(image_sizes[0], Tensor):  # in a traced graph, where numbers would be constants
        sizes = torch.stack(list(image_sizes)).to(like.device)
        return _mask((sizes + stride - 1) // stride, like)
    cells = [(-(-int(h) // stride), -(-int(w) // stride)) for h, w in image_sizes]
    for (h, w), size in zip(cells, image_sizes, strict=True):
        if not (0 < h <= height and 0 < w <= width):
            raise ValueError(
                f"Image size {tuple(size)} does not fit the batch, whose feature map at stride "
                f"{stride} is {height}x{width}: pass (height, width) in pixels of the input."
            )
    return _mask(torch.tensor(cells, device=like.device), like)


def _mask(extent: Tensor, like: Tensor) -> Tensor:
    height, width = like.shape[2:]
    rows = torch.arange(height, device=like.device)[None] < extent[:, :1]
    columns = torch.arange(width, device=like.device)[None] < extent[:, 1:]
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(like.dtype)


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm.

    Inputs of any size are zero-padded to a multiple of the stride, as in the official detection
    code.

    Args:
        in_channels: input channels.
        dim: output channels.
        stride: stride, and kernel size of non-overlapping patches.
        overlap_kernel: kernel size of overlapping patches (``conv_embed``); None for
            non-overlapping ones.
        overlap_padding: padding of overlapping patches, pixels.
    Source: arXiv:2203.11926, section 3.3; microsoft/FocalNet:classification/focalnet.py
    (PatchEmbed), and detection/mmdet/models/backbones/focalnet.py for the padding.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        stride: int,
        overlap_kernel: int | None = None,
        overlap_padding: int = 0,
    ) -> None:
        super().__init__()
        self.stride = stride
        if overlap_kernel is None:
            self.proj = nn.Conv2d(in_channels, dim, stride, stride)
        else:
            self.proj = nn.Conv2d(in_channels, dim, overlap_kernel, stride, overlap_padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (N, in_channels, H, W) as (N, ceil(H / stride), ceil(W / stride), dim)."""
        x = pad_to_multiple(x, self.stride)
        if self._use_patch_product(x):
            dtype, stored = policy.compute_dtype(x)
            with torch.autocast(x.device.type, enabled=False):
                out = patch_product(x, self.proj.weight, self.proj.bias, dtype)
            return layer_norm(out.to(stored), self.norm)
        return layer_norm(channels_last(self._convolve(x)), self.norm)

    def _use_patch_product(self, x: Tensor) -> bool:
        """Tell whether to compute the convolution as a matrix product, which is faster."""
        proj = self.proj
        if proj.kernel_size != proj.stride or has_hooks(proj) or type(proj) is not nn.Conv2d:
            return False
        if x.shape[1] != proj.in_channels:
            return False  # the convolution raises the error
        # Without a backward pass only small patches are faster; see patch_product.
        small = proj.weight[0].numel() <= len(proj.weight)
        return (small or torch.is_grad_enabled()) and policy.supports_patch_products(x)

    def _convolve(self, x: Tensor) -> Tensor:
        if not policy.is_dtype_emulated(x):
            return self.proj(x)
        dtype, stored = policy.compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            out = functional_call(
                self.proj,
                {name: value.to(dtype) for name, value in self.proj.named_parameters()},
                x.to(dtype),
            )
        return out.to(stored)
