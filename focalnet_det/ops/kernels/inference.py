"""A whole block without autograd, in two passes over an NHWC map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .depthwise import depthwise
from .parameters import Affine, BlockWeights, ModulationWeights
from .tiles import global_context, rows, tiles


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Focal modulation and MLP with their norms and residuals.

    The first pass makes the contexts of all levels; it needs neighbors and the whole map. The
    second is per pixel and runs tile by tile, so that the query, the modulator and the hidden
    layer of the MLP never leave the cache.

    Args:
        x: (N, H, W, C).
        weights: of the block.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        dtype: in which to compute.
    Returns: (N, H, W, C), in the type of ``x``.
    """
    return _block(x.to(dtype).contiguous(), weights.to(dtype), valid).to(x.dtype)


def _block(x: Tensor, weights: BlockWeights, valid: Tensor | None) -> Tensor:
    shape = x.shape
    before, after1 = (None, weights.norm1) if weights.post_norm else (weights.norm1, None)
    after2 = weights.norm2 if weights.post_norm else None
    local, gate, shared = _contexts(_norm(x, before), weights.modulation, valid)
    flat = x.view(shape[0], -1, shape[-1])
    out = torch.empty_like(flat)
    for images, pixels in tiles(flat):
        tile = flat[images, pixels]
        context = torch.baddbmm(local[images, pixels], gate[images, pixels], shared[images])
        product = _product(rows(_norm(tile, before)), rows(context), weights.modulation)
        y = rows(out[images, pixels])
        _add_branch(rows(tile), product, weights.modulation.proj, weights.gamma_1, after1, out=y)
        hidden = _hidden(y if weights.post_norm else _norm(y, weights.norm2), weights.mlp.fc1)
        _add_branch(y, hidden, weights.mlp.fc2, weights.gamma_2, after2, out=y)
    return out.view(shape)


def _add_branch(
    x: Tensor, branch: Tensor, last: Affine, gamma: Tensor | None, norm: Affine | None, out: Tensor
) -> None:
    """``out = x + gamma * norm(last(branch))``, the matrix product adding to the residual."""
    weight, bias = last.weight, last.bias
    if norm is not None:
        branch = _norm(F.linear(branch, weight, bias), norm)
        torch.add(x, branch if gamma is None else branch.mul_(gamma), out=out)
        return
    if gamma is not None:
        weight, bias = weight * gamma[:, None], bias * gamma
    torch.add(x, bias, out=out).addmm_(branch, weight.mT)


def _contexts(
    x: Tensor, weights: ModulationWeights, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated sum of the focal contexts, (N, P, C), the gate of the global one, (N, P, 1), and it."""
    n, h, w, c = x.shape
    flat = x.view(n, h * w, c)
    context = F.linear(x, weights.f.weight[c : 2 * c], weights.f.bias[c : 2 * c])
    gates = F.linear(flat, weights.f.weight[2 * c :], weights.f.bias[2 * c :])
    gates /= weights.divisor
    if valid is not None:
        context *= valid
    local = None
    for level, kernel in enumerate(weights.kernels):
        context = depthwise(context, kernel)
        torch.ops.aten.gelu.out(context, out=context)
        if valid is not None:
            context *= valid
        gated = context.view_as(flat)
        if local is None:
            local = gated * gates[..., level : level + 1]
            continue
        for tile in tiles(gated):
            local[tile] += gated[tile] * gates[tile][..., level : level + 1]
    area = h * w if valid is None else valid.sum((1, 2))
    shared = global_context(context.sum((1, 2)), area)
    return torch.zeros_like(flat) if local is None else local, gates[..., -1:], shared


def _product(x: Tensor, context: Tensor, weights: ModulationWeights) -> Tensor:
    """``query * h(context)`` of (P, C) rows, normed if the modulation has a norm."""
    c = x.shape[-1]
    query = F.linear(x, weights.f.weight[:c], weights.f.bias[:c])
    query *= F.linear(context, weights.h.weight, weights.h.bias)
    return _norm(query, weights.ln)


def _hidden(x: Tensor, fc1: Affine) -> Tensor:
    hidden = F.linear(x, fc1.weight, fc1.bias)
    return torch.ops.aten.gelu.out(hidden, out=hidden)


def _norm(x: Tensor, norm: Affine | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
