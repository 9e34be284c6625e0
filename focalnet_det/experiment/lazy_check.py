"""Checks of a LazyConfig before anything is built: arguments that calls do not take, and values."""

from collections.abc import Iterator
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from .lazy_tree import arguments_of, calls, close_match, constructor_of, takes_anything, target_of
from .rules import range_problem
from .values import fits, type_name

# Arguments whose annotations say less than what configs may give.
PARTS = frozenset({"augmentations"})
SCALARS = (bool, int, float, str)


def problems(cfg: DictConfig) -> list[str]:
    """Return what is wrong with calls and values, one sentence each."""
    found = [problem for key, node in calls(cfg) for problem in unknown_arguments(key, node)]
    # Options of the run are checked where they are read.
    for section in ("model", "optimizer", "schedule", "dataloader"):
        for key, node in calls(cfg[section], section):
            wrong = dict(type_problems(key, node))
            ranges = [text for name, text in range_problems(key, node) if name not in wrong]
            found += [*wrong.values(), *ranges]
    return found


def unknown_arguments(key: str, node: DictConfig) -> Iterator[str]:
    """Yield a sentence for every argument that a call does not take."""
    if takes_anything(node):
        return
    known = arguments_of(node)
    for name in map(str, node):
        if name not in known and name != "_target_":
            path = f"{key}.{name}".lstrip(".")
            target = target_of(node).__name__
            yield f"{path} is unknown to {target}.{close_match(name, known)}"


def type_problems(key: str, node: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield name and sentence for every plain value that is not of its annotated type."""
    for name, value in plain_values(node):
        kind = hints(node).get(name)
        if kind is not None and name not in PARTS and not fits(value, kind):
            yield name, f"{key}.{name} must be {type_name(kind)}, got {value!r}."


def range_problems(key: str, node: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield name and sentence for every number out of its range."""
    for name, value in plain_values(node):
        numbers = list(value.values()) if isinstance(value, dict) else value
        if problem := range_problem(f"{key}.{name}", name, numbers):
            yield name, problem


def hints(node: DictConfig) -> dict[str, Any]:
    """Return the annotations of a call's arguments; {} where they cannot be read."""
    constructor = constructor_of(node)
    try:
        found = get_type_hints(constructor)
    except (NameError, TypeError, AttributeError):
        return {}
    if not constructor.__module__.startswith("focalnet_det."):
        # Elsewhere, Tuple[float] may mean three numbers.
        found = {name: kind for name, kind in found.items() if kind in SCALARS}
    if takes_anything(node) and "variant" in found:
        from ..backbones.build import BACKBONE_CLASSES

        # Arguments of one name have one type in all families.
        for network in BACKBONE_CLASSES.values():
            found = {**get_type_hints(network.__init__), **found}
    return found


def plain_values(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the arguments of a call that are no calls themselves."""
    for name in map(str, node):
        if name == "_target_" or OmegaConf.is_missing(node, name):
            continue
        value = node[name]
        if OmegaConf.is_config(value):
            if next(calls(value), None) is not None:
                continue
            value = OmegaConf.to_container(value, resolve=True)
        if isinstance(value, bool | int | float | str | list | dict | None):
            yield name, value
