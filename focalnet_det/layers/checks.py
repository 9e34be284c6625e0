"""Checks of constructor arguments, with one wording."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Check that an argument is a whole number in a range.

    Raises: ValueError that names the argument, its value and the range.
    """
    if not isinstance(value, Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be {low} or more and at most {high} (whole), got {value!r}.")


def check_number(name: str, value: Any, low: float, high: float, *, below: bool = False) -> None:
    """Check that an argument is a finite number in a range.

    Args:
        below: whether the upper end is outside the range.
    Raises: ValueError that names the argument, its value and the range.
    """
    number = isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high
    if not number or (below and value == high):
        end = "below" if below else "at most"
        raise ValueError(f"{name} must be {low:g} or more and {end} {high:g}, got {value!r}.")


def check_integers(name: str, values: Sequence[Any], low: int, high: int) -> None:
    """Check that every entry of an argument is a whole number in a range.

    Raises: ValueError that names the argument, its value and the range.
    """
    if not all(isinstance(value, Integral) and low <= int(value) <= high for value in values):
        raise ValueError(
            f"{name} must be {low} or more and at most {high} (whole) in every entry, "
            f"got {tuple(values)}."
        )


def check_flag(name: str, value: Any) -> None:
    """Check that an argument is True or False; strings such as "no" count as true elsewhere.

    Raises: ValueError that names the argument and its value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
