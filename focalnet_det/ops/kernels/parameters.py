"""Weights of a block as plain tensors, in the order in which the fused functions take them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """Weight and bias of a linear layer, or of a norm with its ``eps``."""

    weight: Tensor
    bias: Tensor
    eps: float = 0.0

    def to(self, dtype: torch.dtype) -> "Affine":
        """In another type; the tensors themselves where it is theirs already."""
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
        """What the sum of the contexts is divided by."""
        return len(self.kernels) + 1 if self.normalize else 1

    def to(self, dtype: torch.dtype) -> "ModulationWeights":
        """All tensors in one type."""
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
        """All tensors in one type."""
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
        """All tensors in one type."""
        return BlockWeights(
            self.norm1.to(dtype),
            self.modulation.to(dtype),
            None if self.gamma_1 is None else self.gamma_1.to(dtype),
            self.norm2.to(dtype),
            self.mlp.to(dtype),
            None if self.gamma_2 is None else self.gamma_2.to(dtype),
            self.post_norm,
        )
