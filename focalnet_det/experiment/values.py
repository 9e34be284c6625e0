"""Check types and ranges of values in configs."""

import collections.abc
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """Error with all problems of a config or a command line.

    Args:
        problems: one or more messages, each with advice.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        text = problems[0]
        if len(problems) > 1:
            listed = " ".join(f"({k}) {problem}" for k, problem in enumerate(problems, start=1))
            text = f"{len(problems)} problems: {listed}"
        super().__init__(text)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise an error with all problems, without duplicates.

    Raises: ConfigError if there are any.
    """
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is of an annotated type; unsupported annotations match any value.

    An int is a float, but a bool is not a number; lists and tuples are interchangeable.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if kind is type(None):
        return value is None
    if kind in (int, float):
        is_number = isinstance(value, int) or (kind is float and isinstance(value, float))
        return is_number and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    if origin in (tuple, list, collections.abc.Sequence):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return not arguments or all(fits(item, arguments[0]) for item in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    return True


def type_name(kind: Any) -> str:
    """Return an annotated type in words, such as "a list of integers"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(option) for option in arguments))
    if origin in (tuple, list, collections.abc.Sequence):
        if not arguments:
            return "a list"
        return f"a list of {type_name(arguments[0]).removeprefix('an ').removeprefix('a ')}s"
    if origin in (dict, collections.abc.Mapping):
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, "null" if kind is type(None) else str(kind))


@dataclass(frozen=True)
class Range:
    """A range of numbers.

    Attributes:
        low, high: bounds.
        above: the lower bound is excluded.
    """

    low: float
    high: float = math.inf
    above: bool = False

    def holds(self, value: Any) -> bool:
        """Tell whether a number, or every number of a nested list, is in the range."""
        if isinstance(value, list | tuple):
            return all(self.holds(item) for item in value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True  # `fits` checks types
        if not math.isfinite(value):
            return False
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        if math.isinf(self.high):
            return low
        if self.above:
            return f"{low} and at most {self.high:g}"
        return f"between {self.low:g} and {self.high:g}"


AT_LEAST_0, AT_LEAST_1 = Range(0), Range(1)
POSITIVE, SHARE = Range(0, above=True), Range(0, 1)
