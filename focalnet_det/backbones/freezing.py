"""Freezing the first stages of a backbone."""

from collections.abc import Iterable

from torch import nn


def freeze(modules: Iterable[nn.Module]) -> None:
    """Stops gradients of all parameters in the modules and puts them in eval mode."""
    for module in modules:
        module.eval()
        module.requires_grad_(False)


def keep_frozen_in_eval(modules: Iterable[nn.Module]) -> None:
    """To be called after ``train()``: drop path and dropout would still perturb frozen modules."""
    for module in modules:
        module.eval()
