"""Find the calls in a LazyConfig, and the arguments that they accept."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf


def call_arguments(node: Any) -> list[str]:
    """Return the names of the arguments that a call accepts, [] for other nodes."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return []
    found = inspect.signature(constructor_of(node)).parameters
    return [name for name, p in found.items() if p.kind != p.VAR_KEYWORD and name != "self"]


def accepts_any_argument(node: DictConfig) -> bool:
    """Tell whether a call accepts arguments of any name."""
    found = inspect.signature(constructor_of(node)).parameters.values()
    return any(p.kind == p.VAR_KEYWORD for p in found)


def target_of(node: DictConfig) -> Any:
    """Return the function or class of a call."""
    target = node["_target_"]
    return locate(target) if isinstance(target, str) else target


def constructor_of(node: DictConfig) -> Callable[..., Any]:
    """Return the function whose signature the arguments of a call must match."""
    found = target_of(node)
    # Detectron2's `configurable` wraps constructors.
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
    """Return a hint for a misspelled name, "" if no known name is similar."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
