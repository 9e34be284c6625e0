"""Aggregate focal contexts: the readable reference, in the order of the paper."""

import operator
from collections.abc import Sequence
from functools import reduce

import torch.nn.functional as F
from torch import Tensor


def aggregate_contexts(
    context: Tensor,
    gates: Tensor,
    kernels: Sequence[Tensor],
    *,
    normalize: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Apply hierarchical contextualization followed by gated aggregation.

    Level ``l`` is ``GELU(depthwise_conv(level l-1))``; the global context is the GELU of the last
    level's spatial mean. The result is the gate-weighted sum of all contexts.

    Args:
        context: (N, C, H, W), the projected context, level 0.
        gates: (N, L+1, H, W), unnormalized, any sign; the last one belongs to the global context.
        kernels: L depthwise kernels, each (C, 1, k, k) with odd k, finest level first.
        normalize: divide the sum by L+1 (``normalize_modulator`` of the official yaml files).
        valid: (N, 1, H, W), one inside the image and zero in the batch padding, in the dtype of
            ``context``. Contexts in the padding are zero and the global mean is taken over the
            image, which makes the result independent of batch padding.
    Returns: (N, C, H, W), the aggregated context, from which the modulator is projected.
    Raises: ValueError if there is not one gate more than there are kernels.
    Source: arXiv:2203.11926, section 3.2, equations 4-6.
    """
    if gates.shape[1] != len(kernels) + 1:
        raise ValueError(
            f"{len(kernels)} focal levels need {len(kernels) + 1} gates, one per level and one for "
            f"the global context, got {gates.shape[1]}."
        )
    if valid is not None:
        context = context * valid
    terms = []
    for kernel, gate in zip(kernels, gates.split(1, dim=1), strict=False):
        context = F.conv2d(context, kernel, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])
        context = F.gelu(context)
        if valid is not None:
            context = context * valid
        terms.append(context * gate)
    terms.append(F.gelu(_spatial_mean(context, valid)) * gates[:, -1:])
    aggregated = reduce(operator.add, terms)
    return aggregated / len(terms) if normalize else aggregated


def _spatial_mean(context: Tensor, valid: Tensor | None) -> Tensor:
    """Average (N, C, H, W) over the image to (N, C, 1, 1); ``context`` is zero in the padding."""
    if valid is None:
        return context.mean((2, 3), keepdim=True)
    return context.sum((2, 3), keepdim=True) / valid.sum((2, 3), keepdim=True)
