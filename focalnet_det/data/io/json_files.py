"""JSON files of annotations, and checks of the values in them."""

import json
import math
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from detectron2.utils.file_io import PathManager

from .issues import DataError, shown

Record = dict[str, Any]

# Ids have to be exact as doubles, which some readers of JSON take.
LARGEST_ID = 2**53


def check_regular(path: str | Path, what: str) -> None:
    """Check that a path of this machine, if it exists, is a file: devices and pipes never end.

    Args:
        what: name of the file's kind for the message.
    Raises: DataError for devices, pipes and sockets, IsADirectoryError for a folder.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{what} {path} is a folder.")
    if not stat.S_ISREG(mode):
        raise DataError(f"{what} {path} is a device or a pipe, not a file.")


def read_json_lists(
    path: str | Path, lists: Sequence[str], what: str, optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a JSON object and check that it has some lists of objects.

    Args:
        lists: keys that must be there.
        optional: keys that are lists of objects too if they are there.
        what: name of the format for messages.
    Raises: FileNotFoundError if there is no such file, DataError if it is no JSON or not as above.
    """
    if not PathManager.exists(str(path)):
        raise FileNotFoundError(2, f"No such {what} file", str(path))
    check_regular(path, f"{what} file")
    try:
        # Editors of some systems begin a file with a byte-order mark.
        with PathManager.open(str(path), "r", encoding="utf-8-sig") as file:
            content = json.load(file)
    # RecursionError: brackets nested thousands deep. ValueError: JSON, encoding, endless numbers.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(
            f"{path} is not in {what} format: it holds a {kind}, no object, and lacks "
            f"{', '.join(sorted(lists))}."
        )
    missing = sorted(name for name in lists if name not in content)
    if missing:
        raise DataError(f"{path} is not in {what} format: it lacks {', '.join(missing)}.")
    for name in (*lists, *(other for other in optional if other in content)):
        rows = content[name]
        if not isinstance(rows, list):
            raise DataError(f"{path} is not in {what} format: {name} is {shown(rows)}, no list.")
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise DataError(
                    f"{path} is not in {what} format: {name}[{index}] is {shown(row)}, no object."
                )
    return content


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def is_id(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number that can be an id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_ID


def whole(value: object) -> int | None:
    """Return a positive whole number, also one written as 640.0; None if it is not one."""
    if is_number(value) and value > 0 and value == int(value):
        return int(value)
    return None


def numbers(values: object, count: int) -> list[float] | None:
    """Return a list of finite numbers as floats; None if it is not one of that length."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    if not all(map(is_number, values)):
        return None
    return [float(value) for value in values]


@dataclass(frozen=True)
class Place:
    """Name the place of a row, such as ``annotations[3] (id 7)``, when it is shown."""

    rows: object
    index: int
    record: Record

    def __str__(self) -> str:
        name = f"{self.rows}[{self.index}]"
        return f"{name} (id {shown(self.record['id'])})" if "id" in self.record else name
