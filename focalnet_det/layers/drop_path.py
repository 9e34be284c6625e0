"""Drop residual branches at random: stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop the residual branch of whole samples and rescale the others, in training only.

    Args:
        rate: probability of dropping a sample's branch, 0 <= rate < 1.
    Raises: ValueError if the rate is outside this range.
    Source: arXiv:1603.09382; the same sampling as timm's ``DropPath``.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"The drop path rate must lie in [0, 1), got {rate}.")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop and rescale a residual branch, (N, ...) -> (N, ...)."""
        scales = self.sample_scales(x, x.dtype)
        return x if scales is None else x * scales

    def sample_scales(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Sample the scale of each sample's branch, 0 or 1 / (1 - rate).

        Args:
            x: (N, ...), a tensor of the branch's shape and device.
            dtype: dtype of the result.
        Returns: (N, 1, ...); None if no branch is dropped.
        """
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:.3f}"
