"""Check the arguments and values of a LazyConfig before anything is built."""

from collections.abc import Iterator
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from .lazy_tree import (
    accepts_any_argument,
    call_arguments,
    calls,
    close_match,
    constructor_of,
    target_of,
)
from .rules import range_problem
from .values import fits, type_name

# Arguments that may be a name or a built object, whatever their annotation.
PARTS = frozenset({"augmentations"})
SCALARS = (bool, int, float, str)


def problems(cfg: DictConfig) -> list[str]:
    """Describe unknown arguments and invalid values."""
    found = [problem for key, node in calls(cfg) for problem in unknown_arguments(key, node)]
    # Without "train": TrainOptions checks its own fields.
    for section in ("model", "optimizer", "schedule", "dataloader"):
        for key, node in calls(cfg[section], section):
            wrong = dict(type_problems(key, node))
            ranges = [text for name, text in range_problems(key, node) if name not in wrong]
            found += [*wrong.values(), *ranges]
    return found


def unknown_arguments(key: str, node: DictConfig) -> Iterator[str]:
    """Yield a problem for every argument that a call does not accept."""
    if accepts_any_argument(node):
        return
    known = call_arguments(node)
    for name in map(str, node):
        if name not in known and name != "_target_":
            path = f"{key}.{name}".lstrip(".")
            target = target_of(node).__name__
            yield f"{path} is not an argument of {target}.{close_match(name, known)}"


def type_problems(key: str, node: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield name and problem for every plain value that is not of its annotated type."""
    for name, value in plain_values(node):
        kind = hints(node).get(name)
        if kind is not None and name not in PARTS and not fits(value, kind):
            yield name, f"{key}.{name} must be {type_name(kind)}, got {value!r}."


def range_problems(key: str, node: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield name and problem for every number out of its range."""
    for name, value in plain_values(node):
        numbers = list(value.values()) if isinstance(value, dict) else value
        if problem := range_problem(f"{key}.{name}", name, numbers):
            yield name, problem


def hints(node: DictConfig) -> dict[str, Any]:
    """Return the annotations of a call's arguments, {} if they cannot be resolved."""
    constructor = constructor_of(node)
    try:
        found = get_type_hints(constructor)
    except (NameError, TypeError, AttributeError):
        return {}
    if not constructor.__module__.startswith("focalnet_det."):
        # Other libraries are less strict: in Detectron2, Tuple[float] may mean three numbers.
        found = {name: kind for name, kind in found.items() if kind in SCALARS}
    if accepts_any_argument(node) and "variant" in found:
        from ..backbones.build import BACKBONE_CLASSES

        # The class depends on the variant, but arguments of equal names have equal types.
        for network in BACKBONE_CLASSES.values():
            found = {**get_type_hints(network.__init__), **found}
    return found


def plain_values(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the arguments of a call that do not contain calls."""
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
