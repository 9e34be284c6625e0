"""Read JSON annotation files, and validate their values."""

import json
import math
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from detectron2.utils.file_io import PathManager

from .issues import DataError, shorten

Record = dict[str, Any]

# Largest integer that is exact as a double, as which some JSON readers parse numbers.
MAX_ID = 2**53


def check_regular(path: str | Path, what: str) -> None:
    """Check that a local path, if it exists, is a regular file; reading a pipe may never end.

    Args:
        path: the file.
        what: kind of file, for messages.
    Raises: DataError for devices, pipes and sockets, IsADirectoryError for a folder.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{what} {path} is a folder, not a file.")
    if not stat.S_ISREG(mode):
        raise DataError(f"{what} {path} is a device or a pipe, not a file.")


def read_json_lists(
    path: str | Path, lists: Sequence[str], what: str, optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a JSON object, and check that its values under some keys are lists of objects.

    Args:
        path: the file.
        lists: required keys.
        what: name of the format, for messages.
        optional: keys that may be absent.
    Raises: FileNotFoundError if the file does not exist, DataError if it is not valid JSON or not
        of this structure.
    """
    if not PathManager.exists(str(path)):
        raise FileNotFoundError(2, f"No such {what} file", str(path))
    check_regular(path, f"{what} file")
    try:
        # Some editors write a byte-order mark.
        with PathManager.open(str(path), "r", encoding="utf-8-sig") as file:
            content = json.load(file)
    # RecursionError: deeply nested brackets. ValueError: JSON syntax, encoding or huge integers.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(
            f"{path} is not in {what} format: it contains a {kind} instead of an object, and lacks "
            f"{', '.join(sorted(lists))}."
        )
    missing = sorted(name for name in lists if name not in content)
    if missing:
        raise DataError(f"{path} is not in {what} format: it lacks {', '.join(missing)}.")
    for name in (*lists, *(other for other in optional if other in content)):
        problem = _list_problem(name, content[name])
        if problem:
            raise DataError(f"{path} is not in {what} format: {problem}.")
    return content


def _list_problem(name: str, rows: object) -> str:
    """Describe why a value is no list of objects, "" if it is one."""
    if not isinstance(rows, list):
        return f"{name} is {shorten(rows)}, not a list"
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            return f"{name}[{index}] is {shorten(row)}, not an object"
    return ""


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number, excluding bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def is_id(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer from 0 to ``MAX_ID``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID


def positive_int(value: object) -> int | None:
    """Convert a positive number without fraction, such as 640 or 640.0; None for other values."""
    if is_number(value) and value > 0 and value == int(value):
        return int(value)
    return None


def float_list(values: object, count: int) -> list[float] | None:
    """Convert a list of ``count`` finite numbers to floats; None for other values."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    if not all(map(is_number, values)):
        return None
    return [float(value) for value in values]


@dataclass(frozen=True)
class RowLocation:
    """Location of a row in a file, such as ``annotations[3] (id 7)``; formatted lazily."""

    rows: object
    index: int
    record: Record

    def __str__(self) -> str:
        name = f"{self.rows}[{self.index}]"
        return f"{name} (id {shorten(self.record['id'])})" if "id" in self.record else name
