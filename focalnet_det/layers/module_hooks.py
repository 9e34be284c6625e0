"""Inspect the hooks of modules."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has hooks, so that calling it does more than its ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
