"""The calls that a LazyConfig consists of, and the arguments that they take."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf


def arguments_of(node: Any) -> list[str]:
    """Return the names of the arguments that a call takes; [] for what is no call."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return []
    found = inspect.signature(constructor_of(node)).parameters
    return [name for name, p in found.items() if p.kind != p.VAR_KEYWORD and name != "self"]


def takes_anything(node: DictConfig) -> bool:
    """Return whether a call takes arguments of any name."""
    found = inspect.signature(constructor_of(node)).parameters.values()
    return any(p.kind == p.VAR_KEYWORD for p in found)


def target_of(node: DictConfig) -> Any:
    """Return the function or class that a call calls."""
    target = node["_target_"]
    return locate(target) if isinstance(target, str) else target


def constructor_of(node: DictConfig) -> Callable[..., Any]:
    """Return the function whose arguments a call gives."""
    found = target_of(node)
    # Detectron2 wraps constructors that read yacs configs.
    init = getattr(found, "__init__", None) if inspect.isclass(found) else None
    return getattr(init, "__wrapped__", None) or found


def calls(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield (key, node) of every call in a config."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        names: list[Any] = [n for n in node if n != "_target_"]
    elif isinstance(node, ListConfig):
        names = list(range(len(node)))
    else:
        return
    for name in names:
        if not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
            yield from calls(node[name], f"{key}.{name}".lstrip("."))


def close_match(name: str, known: list[str]) -> str:
    """Return a hint at what a misspelled name may mean."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
