"""Switch between the two dimension orders of a feature map; both functions return views."""

from torch import Tensor


def channels_first(x: Tensor) -> Tensor:
    """View (N, H, W, C) as (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)
