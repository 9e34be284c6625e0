"""Freezing the first stages of a backbone."""

from collections.abc import Iterable

from torch import nn


def freeze(modules: Iterable[nn.Module]) -> None:
    """Stop gradients of all parameters in the modules and put them in eval mode."""
    for module in modules:
        module.eval()
        module.requires_grad_(False)


def keep_frozen_in_eval(modules: Iterable[nn.Module]) -> None:
    """Put frozen modules back in eval mode after ``train()``: drop path would perturb them."""
    for module in modules:
        module.eval()
