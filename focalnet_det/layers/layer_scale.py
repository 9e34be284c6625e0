"""Create the parameters of layer scale."""

import torch
from torch import nn


def layer_scale_parameter(dim: int, init: float | None) -> nn.Parameter | None:
    """Create a learnable scale per channel of a residual branch.

    Args:
        dim: channels of the branch.
        init: initial value of the scales, None for no layer scale.
    Returns: (dim,), or None. A bare parameter rather than a module, because the official FocalNet
        files call it ``gamma_1`` and ``gamma_2``.
    Source: arXiv:2103.17239, section 2.1.
    """
    return None if init is None else nn.Parameter(torch.full((dim,), float(init)))
