"""Run a whole block without autograd in one call of the C++ kernels, where that is the faster."""

import ctypes
from typing import cast

import torch
from torch import Tensor

from ...cpu import structs
from ...cpu.library import Library, library
from .. import policy
from ..pytorch import inference
from ..weights import Affine, BlockWeights
from .native_training import STEPS


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute a block, see :func:`focalnet_det.ops.focal_block.pytorch.inference.block`."""
    native = cast(Library, library())
    if not policy.runs_in_one_call(native, x, weights, dtype):
        return inference.block(x, weights, valid, dtype, steps=STEPS)
    return block_in_one_call(native, x, weights, valid, dtype)


def block_in_one_call(
    native: Library, x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Run a whole block in inference.

    Args:
        native: the kernels.
        x: (N, H, W, C), of one of the dtypes of the kernels.
        weights: of the block; at most ``structs.MOST_LEVELS`` levels.
        valid: (N, H, W, 1).
        dtype: of the products, bfloat16 only where the kernels have tile registers.
    Returns: (N, H, W, C), contiguous.
    """
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    struct = structs.Block(x=x.data_ptr(), out=out.data_ptr(), threads=torch.get_num_threads())
    alive: list[Tensor] = []

    def pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        if tensor is None:
            return None
        alive.append(tensor.detach().to(dtype).contiguous())
        return alive[-1].data_ptr()

    modulation, mlp = weights.modulation, weights.mlp
    layers: dict[str, Affine | None] = {
        "norm1": weights.norm1, "f": modulation.f, "h": modulation.h,
        "proj": modulation.proj, "ln": modulation.ln, "norm2": weights.norm2,
        "fc1": mlp.fc1, "fc2": mlp.fc2,
    }  # fmt: skip
    for name, layer in layers.items():
        if layer is not None:
            kind = dtype if layer.weight.ndim == 2 else torch.float32
            setattr(struct, f"{name}_weight", pointer(layer.weight, kind))
            setattr(struct, f"{name}_bias", pointer(layer.bias))
            if hasattr(struct, f"{name}_eps"):
                setattr(struct, f"{name}_eps", layer.eps)
    struct.gamma1, struct.gamma2 = pointer(weights.gamma_1), pointer(weights.gamma_2)
    struct.valid = pointer(valid)
    struct.n, struct.h, struct.w, struct.c = x.shape
    struct.sixteen_maps = x.dtype == torch.bfloat16
    struct.sixteen_products = dtype == torch.bfloat16
    struct.hidden, struct.post_norm = len(mlp.fc1.weight), weights.post_norm
    struct.levels, struct.divisor = len(modulation.kernels), modulation.divisor
    for level, kernel in enumerate(modulation.kernels):
        struct.kernels[level], struct.sizes[level] = pointer(kernel), kernel.shape[-1]
    native.run("block", cast(ctypes.Structure, struct))
    return out
