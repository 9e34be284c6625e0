"""Apply overrides to a LazyConfig: only known keys, and values of the same kind."""

import copy
import math
from collections.abc import Iterator
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .lazy_tree import accepts_any_argument, call_arguments, close_match
from .values import raise_problems, type_name

SECTIONS = ("model", "optimizer", "schedule", "dataloader", "train")
# Sections without new keys, because nothing would read them.
CLOSED = ("", "dataloader", "train")


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Apply overrides to a config.

    Raises: KeyError for an unknown key, ValueError for an invalid override or a value of another
        kind.
    """
    before = {}
    for item in overrides:
        key, equals, _ = item.partition("=")
        key = key.lstrip("+~")
        if not equals:
            raise ValueError(f"An override of a .py config must be key=value, got {item!r}.")
        parent, _, leaf = key.rpartition(".")
        node = select(cfg, parent)
        if not accepts(node, leaf) and not (item.startswith("+") and parent not in CLOSED):
            known = [*map(str, node), *call_arguments(node)] if isinstance(node, DictConfig) else []
            raise KeyError(f"The config has no key {key!r}.{close_match(leaf, known)}")
        # A copy, because lists are modified in place.
        before[key] = copy.deepcopy(select(cfg, key))
    from hydra.errors import HydraException

    try:
        cfg = LazyConfig.apply_overrides(cfg, [item.lstrip("+") for item in overrides])
    except HydraException as error:
        raise ValueError(
            f"Invalid override (a value with = or brackets needs inner quotes): {error}"
        ) from error
    except OmegaConfBaseException as error:
        raise ValueError(f"Invalid override: {error}") from error
    raise_problems([p for key, old in before.items() for p in kind_problems(cfg, key, old)])
    return cfg


def select(cfg: DictConfig, key: str) -> Any:
    """Return the value of a dotted key, None if it does not exist."""
    try:
        return OmegaConf.select(cfg, key) if key else cfg
    except Exception:  # OmegaConf raises many types of errors for missing keys
        return None


def accepts(node: Any, leaf: str) -> bool:
    """Tell whether a mapping has a key, a list has an index, or a call accepts an argument."""
    if isinstance(node, ListConfig):
        return leaf.isdecimal() and int(leaf) < len(node)
    if not isinstance(node, DictConfig):
        return False
    if leaf in node:
        return True
    return "_target_" in node and (leaf in call_arguments(node) or accepts_any_argument(node))


def kinds(value: Any) -> set[str]:
    """Return the kind of a value; for lists, the kinds of their elements."""
    if isinstance(value, list | tuple | ListConfig):
        return {kind for item in value for kind in kinds(item)}
    if isinstance(value, dict | DictConfig):
        return {"mapping"}
    if value is None:
        return set()
    names = {bool: "bool", int: "number", float: "number", str: "text"}
    return {names.get(type(value), "other")}


def kind_problems(cfg: DictConfig, key: str, old: Any) -> list[str]:
    """Describe an override that replaces a value by one of another kind.

    This compares with the former value; `lazy_check` compares with annotations.
    """
    new = select(cfg, key)
    if key in (*SECTIONS, "dataloader.train") and not isinstance(new, DictConfig):
        return [f"{key} is a section of the config: set its keys, such as {key}.{_first(old)}=..."]
    if not all(map(math.isfinite, numbers(new))):
        return [f"{key} must be a finite number, got {_plain(new)}."]
    parent = select(cfg, key.rpartition(".")[0])
    if isinstance(parent, ListConfig) and old is not None:
        scalar = not OmegaConf.is_config(old)
        if new is None or (scalar and OmegaConf.is_config(new)):
            return [
                f"{key} is an entry of a list with the value {_described(old)}, got "
                f"{_plain(new)!r}."
            ]
    if new is None or old is None:
        return []
    if isinstance(old, DictConfig) and "_target_" not in old and not isinstance(new, DictConfig):
        return [f"{key} must be a mapping, got {_plain(new)!r}."]
    if isinstance(old, DictConfig) != isinstance(new, DictConfig):
        keys = f": set its keys, such as {key}.{_first(old)}=..." if _first(old) else ""
        return [f"{key} must not replace {_described(old)}, got {new!r}{keys}"]
    is_list = isinstance(old, ListConfig)
    if is_list and not isinstance(new, ListConfig) and not key.endswith("datasets"):
        return [f"{key} must be a list, got {new!r}."]
    if not is_list and isinstance(new, ListConfig) and not new:
        return [f"{key} must not replace {_described(old)}, got an empty list."]
    if kinds(old) and kinds(new) and not kinds(old) & kinds(new):
        required = f"be like {_plain(old)}" if is_list else f"be {type_name(type(old))}"
        return [f"{key} must {required}, got {_plain(new)!r}."]
    return []


def numbers(value: Any) -> Iterator[float]:
    """Yield the numbers of a plain value or of nested lists."""
    if isinstance(value, list | tuple | ListConfig):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def _first(node: Any) -> str:
    names = [str(k) for k in node if k != "_target_"] if isinstance(node, DictConfig) else []
    return names[0] if names else ""


def _described(value: Any) -> str:
    return "a mapping" if isinstance(value, DictConfig) else repr(_plain(value))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
