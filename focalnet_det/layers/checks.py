"""Check constructor arguments, with uniform error messages."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Check that an argument is an integer in [low, high].

    Raises: ValueError that names the argument, its value and the range.
    """
    if not isinstance(value, Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be an integer between {low} and {high}, got {value!r}.")


def check_number(name: str, value: Any, low: float, high: float, *, below: bool = False) -> None:
    """Check that an argument is a finite number in [low, high], or in [low, high) with ``below``.

    Raises: ValueError that names the argument, its value and the range.
    """
    in_range = isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high
    if not in_range or (below and value == high):
        bounds = f"at least {low:g} and below" if below else f"a number between {low:g} and"
        raise ValueError(f"{name} must be {bounds} {high:g}, got {value!r}.")


def check_integers(name: str, values: Sequence[Any], low: int, high: int) -> None:
    """Check that every entry of an argument is an integer in [low, high].

    Raises: ValueError that names the argument, its value and the range.
    """
    if not all(isinstance(value, Integral) and low <= int(value) <= high for value in values):
        raise ValueError(f"{name} must be integers between {low} and {high}, got {tuple(values)}.")


def check_flag(name: str, value: Any) -> None:
    """Check that an argument is a bool: a string such as "no" would be treated as true.

    Raises: ValueError that names the argument and its value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
