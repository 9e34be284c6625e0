"""Run the fused branches on GPUs: Triton kernels between the matrix products of cuBLAS.

Query, context and gates are the columns of one product, whose rows are padded to 16 bytes. For the
backward pass that product, the levels before their GELU and the global mean are kept; the gated
sum, ``h``, norms and the levels after their GELU are computed again. Norms read a map in its own
type, and their backward pass adds the gradient of the residual sum. Nothing waits for the device,
and no shape depends on data, so that CUDA graphs can record a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pytorch.training import Options, Residual
from ..weights import Affine, BlockWeights, MlpWeights, ModulationWeights
from . import triton_depthwise as depthwise
from . import triton_gradients, triton_linear, triton_mlp, triton_norm, triton_pointwise
from .triton_launch import fastest
from .triton_prepared import padded_columns, projection

aten = torch.ops.aten


class Contexts(NamedTuple):
    """What the neighbors of a pixel and its image contribute.

    Attributes:
        projected: (N, H, W, columns): query, context, gates and padding.
        levels: (L, N, H, W, C), before their GELU, or None if they are not wanted.
        local: (N, H, W, C), gated sum of the levels after their GELU.
        mean: (N, C), float32, of the last level.
        shared: (N, C), its GELU.
    """

    projected: Tensor
    levels: Tensor | None
    local: Tensor
    mean: Tensor
    shared: Tensor


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Run a whole block without autograd, see :func:`...autograd.block`.

    Branches compute in ``dtype``; sums with their input keep the type of ``x``.
    """
    weights, x = weights.to(dtype), x.contiguous()
    modulation = weights.modulation
    normed = x.to(dtype) if weights.post_norm else _norm(x, weights.norm1, dtype)
    contexts = _contexts(normed, modulation, valid, keep=False)
    product = triton_linear.modulate(
        contexts.local, modulation.h, contexts.projected,
        F.linear(contexts.shared, modulation.h.weight),
        2 * x.shape[-1] + len(modulation.kernels), float(modulation.divisor),
    )  # fmt: skip
    product = _norm(product, modulation.ln, dtype)
    if weights.post_norm:
        branch = _norm(_linear(product, modulation.proj), weights.norm1, dtype)
        x = triton_linear.scaled_sum(x, branch, weights.gamma_1)
        branch = _linear(triton_linear.gelu_of(x.to(dtype), weights.mlp.fc1), weights.mlp.fc2)
        return triton_linear.scaled_sum(x, _norm(branch, weights.norm2, dtype), weights.gamma_2)
    x = triton_linear.add(x, product, modulation.proj, weights.gamma_1)

    def separate() -> Tensor:
        hidden = triton_linear.gelu_of(_norm(x, weights.norm2, dtype), weights.mlp.fc1)
        return triton_linear.add(x, hidden, weights.mlp.fc2, weights.gamma_2)

    if weights.gamma_2 is not None or not triton_mlp.takes(weights.mlp):
        return separate()
    key = "mlp", x.dtype, dtype, *weights.mlp.fc1.weight.shape
    return fastest(x, key, lambda: triton_mlp.mlp(x, weights.norm2, weights.mlp), separate)


def modulation_forward(
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    options: Options,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the branch, see :func:`...pytorch.training.modulation_forward`."""
    dtype = options.stored
    weights = weights.to(dtype)
    normed, _ = _normed(x.contiguous(), norm, dtype)
    contexts = _contexts(normed, weights, valid, keep=not options.recompute)
    product = triton_pointwise.product(
        contexts.projected, F.linear(contexts.local, weights.h.weight), weights.h.bias,
        F.linear(contexts.shared, weights.h.weight),
        2 * x.shape[-1] + len(weights.kernels), float(weights.divisor),
    )  # fmt: skip
    out = _sum(x, _linear(_norm(product, weights.ln, dtype), weights.proj), residual)
    if contexts.levels is None:
        return out, []
    return out, [contexts.projected, contexts.levels, contexts.mean]


def modulation_kept(x: Tensor, kernels: Sequence[Tensor], options: Options) -> list[Tensor]:
    """Return projection, levels before their GELU and global mean, without values."""
    if options.recompute:
        return []
    n, h, w, c = x.shape
    levels = len(kernels)
    return [
        x.new_empty((n, h, w, padded_columns(c, levels)), dtype=options.stored),
        x.new_empty((levels, n, h, w, c), dtype=options.stored),
        x.new_empty((n, c), dtype=torch.float32),
    ]


def modulation_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    kept: list[Tensor],
    options: Options,
    residual: Residual | None = None,
) -> list[Tensor]:
    """Compute the branch, see :func:`...pytorch.training.modulation_backward`."""
    dtype, c, count = options.stored, x.shape[-1], len(weights.kernels)
    weights, before = weights.to(dtype), x.contiguous()
    grad_sum, gradient, grad_bias = _gradients(gradient, dtype, residual)
    normed, statistics = _normed(before, norm, dtype)
    if not kept:
        again = _contexts(normed, weights, valid, keep=True)
        assert again.levels is not None
        kept = [again.projected, again.levels, again.mean]
    projected, levels, mean = kept
    shared, divisor = F.gelu(mean), float(weights.divisor)
    total, after = triton_pointwise.aggregate(levels, projected, shared, valid, divisor)
    modulator = _linear(total, weights.h)
    grad_projected = torch.empty_like(projected)

    grad_product = gradient @ weights.proj.weight
    grad_ln: tuple[Tensor, ...] = ()
    product: Tensor | None = None
    if weights.ln is not None:
        before_norm = projected[..., :c] * modulator
        product, statistics_ln = _normed(before_norm, weights.ln, dtype)
        grad_product, grad_ln = _norm_backward(grad_product, before_norm, weights.ln, statistics_ln)
    plain, grad_modulator, grad_h_bias = triton_gradients.product_backward(
        projected, modulator, grad_product, grad_projected, again=product is None
    )
    grad_proj = _weight_gradient(gradient, plain if product is None else product), grad_bias
    grad_h = _weight_gradient(grad_modulator, total), grad_h_bias
    grad_total = grad_modulator @ weights.h.weight

    grad_shared = triton_gradients.gated_sum(grad_total, projected, 2 * c + count, divisor)
    area = _area(x, valid)
    grad_last = aten.gelu_backward(grad_shared, mean)
    grad_last = grad_last / (area[:, None] if isinstance(area, Tensor) else area)
    grad_level = triton_pointwise.gates_backward(
        grad_total, levels, projected, shared, grad_last, valid, divisor, grad_projected
    )
    grad_kernels: list[Tensor] = []
    for index in range(count - 1, -1, -1):
        kernel = weights.kernels[index]
        source = projected[..., c : 2 * c] if index == 0 else after[index - 1]
        grad_kernels.insert(0, depthwise.weight_gradient(source, grad_level, kernel.shape[-1]))
        if index == 0:
            depthwise.level_backward(grad_level, kernel, valid, grad_projected[..., c : 2 * c])
            continue
        grad_next, grad_level = grad_level, torch.empty_like(grad_level)
        inner = (projected, 2 * c + index - 1, divisor, grad_total, levels[index - 1])
        depthwise.level_backward(grad_next, kernel, valid, grad_level, inner)

    grad_weight, grad_bias = (
        _weight_gradient(grad_projected, normed),
        grad_projected.flatten(0, 2).sum(0),
    )
    used = 2 * c + count + 1
    weight = F.pad(weights.f.weight, (0, 0, 0, projected.shape[-1] - used))
    grad_x, grad_norm = _norm_backward(grad_projected @ weight, before, norm, statistics, grad_sum)
    return [
        grad_x, *grad_norm, grad_weight[:used], grad_bias[:used], *grad_h, *grad_proj, *grad_ln,
        *grad_kernels,
    ]  # fmt: skip


def mlp_forward(
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    options: Options,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the branch, see :func:`...pytorch.training.mlp_forward`."""
    dtype = options.stored
    weights = weights.to(dtype)
    normed, _ = _normed(x.contiguous(), norm, dtype)
    hidden = _linear(normed, weights.fc1)
    out = _sum(x, _linear(F.gelu(hidden), weights.fc2), residual)
    return out, [] if options.recompute else [hidden]


def mlp_kept(x: Tensor, hidden: int, options: Options) -> list[Tensor]:
    """Return the hidden layer before its GELU, (N, H, W, hidden), without values."""
    return [] if options.recompute else [x.new_empty((*x.shape[:3], hidden), dtype=options.stored)]


def mlp_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    kept: list[Tensor],
    options: Options,
    residual: Residual | None = None,
) -> list[Tensor]:
    """Compute the branch, see :func:`...pytorch.training.mlp_backward`."""
    dtype = options.stored
    weights, before = weights.to(dtype), x.contiguous()
    grad_sum, gradient, grad_bias = _gradients(gradient, dtype, residual)
    normed, statistics = _normed(before, norm, dtype)
    hidden = kept[0] if kept else _linear(normed, weights.fc1)
    activation, grad_hidden, grad_hidden_bias = triton_gradients.gelu_backward(
        hidden, gradient @ weights.fc2.weight
    )
    grad_fc2 = _weight_gradient(gradient, activation), grad_bias
    grad_fc1 = _weight_gradient(grad_hidden, normed), grad_hidden_bias
    grad_normed = grad_hidden @ weights.fc1.weight
    grad_x, grad_norm = _norm_backward(grad_normed, before, norm, statistics, grad_sum)
    return [grad_x, *grad_norm, *grad_fc1, *grad_fc2]


def _contexts(
    normed: Tensor, weights: ModulationWeights, valid: Tensor | None, *, keep: bool
) -> Contexts:
    n, h, w, c = normed.shape
    f, all_taps = projection(weights)
    count = len(all_taps)
    projected = _linear(normed, f)
    context = projected[..., c : 2 * c]
    if valid is not None:
        context *= valid
    levels = normed.new_empty((count, n, h, w, c)) if keep else None
    local: Tensor | None = None
    after: Tensor | None = context
    for index, taps in enumerate(all_taps):
        assert after is not None
        local, after, partial = depthwise.level(
            after, taps, projected, 2 * c + index, weights.divisor, local, valid,
            None if levels is None else levels[index], post=index + 1 < count,
        )  # fmt: skip
    assert local is not None
    mean, shared = depthwise.mean(partial, _area(normed, valid), normed.dtype)
    return Contexts(projected, levels, local, mean, shared)


def _area(x: Tensor, valid: Tensor | None) -> Tensor | int:
    return x.shape[1] * x.shape[2] if valid is None else valid.sum((1, 2, 3), dtype=torch.float32)


def _linear(x: Tensor, layer: Affine) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _weight_gradient(gradient: Tensor, x: Tensor | None) -> Tensor:
    assert x is not None
    return gradient.flatten(0, -2).mT @ x.flatten(0, -2)


def _sum(x: Tensor, branch: Tensor, residual: Residual | None) -> Tensor:
    """Return the branch, or its sum with the input, in one pass."""
    if residual is None:
        return branch
    if residual.factors is None:
        return x + branch
    return torch.addcmul(x, branch, residual.factors.to(branch.dtype))


def _gradients(
    gradient: Tensor, dtype: torch.dtype, residual: Residual | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return gradients by the input around the branch, if any, the branch, and its bias."""
    gradient = gradient.contiguous()
    factors = None if residual is None else residual.factors
    if factors is None and gradient.dtype == dtype:
        grad_branch, grad_bias = gradient, gradient.flatten(0, 2).sum(0)
    else:
        grad_branch, grad_bias = triton_gradients.scale(gradient, factors, dtype)
    return None if residual is None else gradient, grad_branch, grad_bias


def _norm(x: Tensor, norm: Affine | None, dtype: torch.dtype) -> Tensor:
    """Return a map, normed if it has a norm, in another type."""
    if norm is None or x.dtype != dtype:
        return _normed(x, norm, dtype)[0]
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _normed(x: Tensor, norm: Affine | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a map, normed if it has a norm, and what :func:`_norm_backward` needs."""
    return (x.to(dtype), None) if norm is None else triton_norm.norm(x, norm, dtype)


def _norm_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    statistics: Tensor | None,
    residual: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the gradients by ``x``, in its type and plus ``residual``, and by weight and bias."""
    if norm is None or statistics is None:
        return (gradient if residual is None else gradient + residual).to(x.dtype), ()
    grad_x, *grad_parameters = triton_norm.norm_backward(gradient, x, norm, statistics, residual)
    return grad_x, tuple(grad_parameters)
