"""Hold weights of a block as plain tensors, in the order that the fused functions take."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """Weight and bias of a linear layer, or of a norm with its ``eps``."""

    weight: Tensor
    bias: Tensor
    eps: float = 0.0

    def to(self, dtype: torch.dtype) -> "Affine":
        """Convert to another type; the same where it is theirs already."""
        if self.weight.dtype == self.bias.dtype == dtype:
            return self
        return Affine(self.weight.to(dtype), self.bias.to(dtype), self.eps)


class ModulationWeights(NamedTuple):
    """What :class:`focalnet_det.backbones.focalnet.FocalModulation` holds; ``h`` is (C, C)."""

    f: Affine
    h: Affine
    proj: Affine
    ln: Affine | None
    kernels: Sequence[Tensor]
    normalize: bool

    @property
    def divisor(self) -> int:
        """Return what the sum of the contexts is divided by."""
        return len(self.kernels) + 1 if self.normalize else 1

    def to(self, dtype: torch.dtype) -> "ModulationWeights":
        """Convert all tensors to one type."""
        return ModulationWeights(
            self.f.to(dtype),
            self.h.to(dtype),
            self.proj.to(dtype),
            None if self.ln is None else self.ln.to(dtype),
            [kernel.to(dtype) for kernel in self.kernels],
            self.normalize,
        )


class MlpWeights(NamedTuple):
    """What :class:`focalnet_det.layers.Mlp` holds."""

    fc1: Affine
    fc2: Affine

    def to(self, dtype: torch.dtype) -> "MlpWeights":
        """Convert all tensors to one type."""
        return MlpWeights(self.fc1.to(dtype), self.fc2.to(dtype))


class BlockWeights(NamedTuple):
    """What a :class:`focalnet_det.backbones.focalnet.FocalNetBlock` holds."""

    norm1: Affine
    modulation: ModulationWeights
    gamma_1: Tensor | None
    norm2: Affine
    mlp: MlpWeights
    gamma_2: Tensor | None
    post_norm: bool

    def to(self, dtype: torch.dtype) -> "BlockWeights":
        """Convert all tensors to one type."""
        return BlockWeights(
            self.norm1.to(dtype),
            self.modulation.to(dtype),
            None if self.gamma_1 is None else self.gamma_1.to(dtype),
            self.norm2.to(dtype),
            self.mlp.to(dtype),
            None if self.gamma_2 is None else self.gamma_2.to(dtype),
            self.post_norm,
        )


class ModulationLayout(NamedTuple):
    """How :func:`flatten_modulation` lays tensors out: ``eps`` of norms that are there, or None."""

    norm_eps: float | None
    ln_eps: float | None
    normalize: bool


def flatten_modulation(
    norm: Affine | None, weights: ModulationWeights
) -> tuple[list[Tensor], ModulationLayout]:
    """Return all tensors of a branch, those of its norm first, and their layout."""
    layers = (norm, weights.f, weights.h, weights.proj, weights.ln)
    tensors = [tensor for layer in layers if layer is not None for tensor in layer[:2]]
    layout = ModulationLayout(_eps(norm), _eps(weights.ln), weights.normalize)
    return [*tensors, *weights.kernels], layout


def unflatten_modulation(
    tensors: Sequence[Tensor], layout: ModulationLayout
) -> tuple[Affine | None, ModulationWeights]:
    """Invert :func:`flatten_modulation`."""
    rest = iter(tensors)
    norm = _next_norm(rest, layout.norm_eps)
    f, h, proj = (Affine(next(rest), next(rest)) for _ in range(3))
    ln = _next_norm(rest, layout.ln_eps)
    return norm, ModulationWeights(f, h, proj, ln, list(rest), layout.normalize)


def flatten_mlp(norm: Affine | None, weights: MlpWeights) -> tuple[list[Tensor], float | None]:
    """Return all tensors of a branch, those of its norm first, and the ``eps`` of the norm."""
    layers = (norm, *weights)
    return [tensor for layer in layers if layer is not None for tensor in layer[:2]], _eps(norm)


def unflatten_mlp(
    tensors: Sequence[Tensor], norm_eps: float | None
) -> tuple[Affine | None, MlpWeights]:
    """Invert :func:`flatten_mlp`."""
    rest = iter(tensors)
    norm = _next_norm(rest, norm_eps)
    return norm, MlpWeights(Affine(next(rest), next(rest)), Affine(next(rest), next(rest)))


def _next_norm(tensors: Iterator[Tensor], eps: float | None) -> Affine | None:
    return None if eps is None else Affine(next(tensors), next(tensors), eps)


def _eps(norm: Affine | None) -> float | None:
    return None if norm is None else norm.eps
