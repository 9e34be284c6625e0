"""Freeze the first stages of a backbone."""

from collections.abc import Iterable

from torch import nn


def freeze(modules: Iterable[nn.Module]) -> None:
    """Disable gradients of all parameters of the modules, and set the modules to eval mode."""
    for module in modules:
        module.eval()
        module.requires_grad_(False)


def keep_frozen_in_eval(modules: Iterable[nn.Module]) -> None:
    """Return frozen modules to eval mode after ``train()``: drop path would perturb them."""
    for module in modules:
        module.eval()
