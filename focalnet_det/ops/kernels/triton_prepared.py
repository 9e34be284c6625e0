"""Parameters of a block as the Triton kernels read them, kept between calls in inference."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .parameters import Affine, BlockWeights, ModulationWeights, flatten_mlp, flatten_modulation

# Values of a row of the projection are padded to a multiple of this: 16 bytes in 16 bits.
ALIGNMENT = 8


class Projection(NamedTuple):
    """What makes the contexts of a modulation.

    Attributes:
        f: weight and bias with rows of zeros, so that rows of its result are aligned.
        taps: (k * k, C), float32, of each level.
    """

    f: Affine
    taps: list[Tensor]


_Kept = tuple[tuple[object, ...], BlockWeights, Projection]
_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def block_weights(weights: BlockWeights, dtype: torch.dtype) -> tuple[BlockWeights, Projection]:
    """The weights of a block in another type, and its projection.

    Copies are kept until a parameter changes or is gone, so that a block without autograd launches
    its own kernels alone. Made anew where changes cannot be seen, in inference tensors, and while a
    CUDA graph is recorded, which follows its parameters then.
    """
    first = weights.modulation.f.weight
    if first.is_inference() or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _prepare(weights, dtype)
    modulation, layout = flatten_modulation(weights.norm1, weights.modulation)
    mlp, eps = flatten_mlp(weights.norm2, weights.mlp)
    gammas = [gamma for gamma in (weights.gamma_1, weights.gamma_2) if gamma is not None]
    versions = [(tensor.data_ptr(), tensor._version) for tensor in modulation + mlp + gammas]
    state = dtype, layout, eps, weights.post_norm, versions
    kept: _Kept | None = _KEPT.get(first)
    if kept is None or kept[0] != state:
        kept = state, *_prepare(weights, dtype)
        _KEPT[first] = kept
    return kept[1:]


def projection(weights: ModulationWeights) -> Projection:
    """Of weights in the type to compute in."""
    columns = padded_columns(len(weights.h.weight), len(weights.kernels))
    missing = columns - len(weights.f.weight)
    f = Affine(F.pad(weights.f.weight, (0, 0, 0, missing)), F.pad(weights.f.bias, (0, missing)))
    return Projection(f, [taps(kernel) for kernel in weights.kernels])


def padded_columns(channels: int, levels: int) -> int:
    """Columns of the projection: query, context and gates, and padding."""
    return 2 * channels + -(-(levels + 1) // ALIGNMENT) * ALIGNMENT


def taps(kernel: Tensor, *, turned: bool = False) -> Tensor:
    """(C, 1, k, k) -> (k * k, C), float32, turned around for the gradient by the input."""
    if turned:
        kernel = kernel.flip(2, 3)
    return kernel.flatten(1).t().float().contiguous()


def _prepare(weights: BlockWeights, dtype: torch.dtype) -> tuple[BlockWeights, Projection]:
    # Parameters themselves would keep their entry, and with it their module, for ever.
    converted: BlockWeights = _detached(weights.to(dtype))
    return converted, projection(converted.modulation)


def _detached(value: Any) -> Any:
    """The same nested tuples and lists with tensors that share their memory."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, list):
        return [_detached(one) for one in value]
    return type(value)(*map(_detached, value)) if isinstance(value, tuple) else value
