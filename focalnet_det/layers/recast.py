"""Replace modules of a built model by subclasses that compute the same parameters differently."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def recast(module: nn.Module, kind: type[Module]) -> Module:
    """Return a module of another class with the parameters, submodules and hooks of this one.

    The two share everything, so the first is to be dropped. The class needs no attribute that the
    first has not; its constructor does not run.
    """
    result = kind.__new__(kind)
    result.__dict__.update(module.__dict__)
    return result


def replace_modules(
    model: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]
) -> nn.Module:
    """Replace every module of the classes on the left by one of the class on the right.

    Only the classes themselves count, not their subclasses, which may compute something else.
    Names of parameters stay.

    Returns: the model, or what replaces it.
    """
    replaced: dict[nn.Module, nn.Module] = {}  # a module may have several parents
    for module in model.modules():
        if type(module) in kinds:
            replaced[module] = recast(module, kinds[type(module)])
    for parent in (*model.modules(), *replaced.values()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(model, model)


def set_submodule(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, as ``nn.Module.set_submodule`` of PyTorch 2.5 does."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)
