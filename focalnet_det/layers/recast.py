"""Replace modules of a built model by subclasses that use the same parameters differently."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def recast(module: nn.Module, kind: type[Module]) -> Module:
    """Return a module of another class with the parameters, submodules and hooks of this one.

    Both modules share all their state, so the original should be dropped. The constructor of the
    class does not run, so the class must not need attributes that the original does not have.
    """
    result = kind.__new__(kind)
    result.__dict__.update(module.__dict__)
    return result


def replace_modules(
    model: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]
) -> nn.Module:
    """Replace every module whose class is a key of ``kinds`` by one of the class it maps to.

    Subclasses of the keys are left alone, because they may compute something else. Parameter names
    do not change.

    Returns: the model, or its replacement if its own class is a key.
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
    """Replace a submodule, as ``nn.Module.set_submodule`` of PyTorch 2.5 does."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)
