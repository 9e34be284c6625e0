"""Stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops a residual branch for whole samples and rescales the rest, in training only.

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
        """(N, ...) -> (N, ...)."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
