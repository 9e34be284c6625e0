"""Stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch for whole samples and rescales the rest, in training only.

    Args:
        rate: probability of dropping a sample's branch, 0 <= rate < 1.
    Raises: ValueError if the rate lies outside that range.
    Source: arXiv:1603.09382; the same sampling as timm's ``DropPath``.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"Drop path rate must lie in [0, 1), got {rate}.")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop and rescale a residual branch, (N, ...) -> (N, ...)."""
        factors = self.factors(x, x.dtype)
        return x if factors is None else x * factors

    def factors(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the factor of each sample of a branch like ``x``, (N, 1, ...); None for 1."""
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
