"""Compute the linear layers of RoI heads with the fastest library of a CPU."""

from torch import nn

from ..layers.fast_linear import FastLinear
from ..layers.recast import replace_modules


def use_fast_linears(model: nn.Module) -> nn.Module:
    """Replace each ``nn.Linear`` of a model's ``roi_heads`` by :class:`FastLinear`.

    Subclasses are left unchanged, as are models without RoI heads. Parameters and their names do
    not change; ``FOCALNET_DET_OPS=torch`` or ``FOCALNET_DET_PRODUCTS=mkl`` computes as before.

    Returns: the model.
    """
    heads = getattr(model, "roi_heads", None)
    if isinstance(heads, nn.Module):
        replace_modules(heads, {nn.Linear: FastLinear})
    return model
