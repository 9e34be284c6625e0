"""Layer scale."""

import torch
from torch import nn


def layer_scale_parameter(dim: int, init: float | None) -> nn.Parameter | None:
    """Return a learned factor per channel of a residual branch, (dim,), or None without ``init``.

    Source: arXiv:2103.17239, section 2.1; kept as a bare parameter (``gamma_1``, ``gamma_2``)
    because that is its name in the official FocalNet files.
    """
    return None if init is None else nn.Parameter(torch.full((dim,), float(init)))
