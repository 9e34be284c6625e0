"""Compute a whole block without autograd, in two passes over an NHWC map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import Affine, BlockWeights, ModulationWeights
from .depthwise import depthwise
from .steps import Steps
from .tiles import global_context, rows, tiles

PLAIN = Steps()


def block(
    x: Tensor,
    weights: BlockWeights,
    valid: Tensor | None,
    dtype: torch.dtype,
    steps: Steps = PLAIN,
) -> Tensor:
    """Apply focal modulation and MLP with their norms and residuals.

    The first pass makes the contexts of all levels; it needs neighbors and the whole map. The
    second is per pixel and runs tile by tile, so that the query, the modulator and the hidden
    layer of the MLP never leave the cache.

    Args:
        x: (N, H, W, C).
        weights: of the block.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        dtype: in which to compute.
        steps: computes the matrix products.
    Returns: (N, H, W, C), in the type of ``x``.
    """
    return _block(x.to(dtype).contiguous(), weights.to(dtype), valid, steps).to(x.dtype)


def _block(x: Tensor, weights: BlockWeights, valid: Tensor | None, steps: Steps) -> Tensor:
    shape = x.shape
    before, after1 = (None, weights.norm1) if weights.post_norm else (weights.norm1, None)
    after2 = weights.norm2 if weights.post_norm else None
    local, gate, shared = _contexts(_norm(x, before), weights.modulation, valid, steps)
    flat = x.view(shape[0], -1, shape[-1])
    out = torch.empty_like(flat)
    for images, pixels in tiles(flat):
        tile = flat[images, pixels]
        context = torch.baddbmm(local[images, pixels], gate[images, pixels], shared[images])
        normed = rows(_norm(tile, before))
        product = _product(normed, rows(context), weights.modulation, steps)
        y, proj = rows(out[images, pixels]), weights.modulation.proj
        _add_branch(rows(tile), product, proj, weights.gamma_1, after1, steps, out=y)
        normed = y if weights.post_norm else _norm(y, weights.norm2)
        hidden = _hidden(normed, weights.mlp.fc1, steps)
        _add_branch(y, hidden, weights.mlp.fc2, weights.gamma_2, after2, steps, out=y)
    return out.view(shape)


def _add_branch(
    x: Tensor,
    branch: Tensor,
    last: Affine,
    gamma: Tensor | None,
    norm: Affine | None,
    steps: Steps,
    out: Tensor,
) -> None:
    """Write ``out = x + gamma * norm(last(branch))``, the matrix product adding to the residual."""
    weight, bias = last.weight, last.bias
    if norm is not None:
        branch = _norm(steps.linear(branch, last), norm)
        torch.add(x, branch if gamma is None else branch.mul_(gamma), out=out)
        return
    if gamma is not None:
        weight, bias = weight * gamma[:, None], bias * gamma
    steps.product(branch, weight.mT, torch.add(x, bias, out=out), add=True)


def _contexts(
    x: Tensor, weights: ModulationWeights, valid: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated sum of contexts, (N, P, C), the global gate, (N, P, 1), and context."""
    n, h, w, c = x.shape
    flat = x.view(n, h * w, c)
    context = steps.linear(x, Affine(weights.f.weight[c : 2 * c], weights.f.bias[c : 2 * c]))
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


def _product(x: Tensor, context: Tensor, weights: ModulationWeights, steps: Steps) -> Tensor:
    """Return ``query * h(context)`` of (P, C) rows, normed if the modulation has a norm."""
    c = x.shape[-1]
    query = steps.linear(x, Affine(weights.f.weight[:c], weights.f.bias[:c]))
    query *= steps.linear(context, weights.h)
    return _norm(query, weights.ln)


def _hidden(x: Tensor, fc1: Affine, steps: Steps) -> Tensor:
    hidden = steps.linear(x, fc1)
    return torch.ops.aten.gelu.out(hidden, out=hidden)


def _norm(x: Tensor, norm: Affine | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
