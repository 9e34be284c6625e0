"""Read yaml files with ``_BASE_``, which may contain plain values only."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

BASE = "_BASE_"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one yaml file; tags that would execute code are refused.

    Raises: ValueError if it is not a yaml mapping of plain values.
    """
    try:
        with PathManager.open(str(path), "r") as file:
            content = yaml.safe_load(file)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path} has a yaml tag that executes code or creates objects ({error.problem}): a "
            "config may contain plain values only."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid yaml: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid yaml: it is nested too deeply.") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} is not a config: it must be a mapping of keys to values.")
    return content or {}


def with_bases(path: Path, content: dict[str, Any], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Merge the content of a file into that of its ``_BASE_`` files.

    Args:
        path: path of the file.
        content: content of the file.
        seen: files that led to this one.
    Raises: ValueError if a base is missing, or is directly or indirectly its own base.
    """
    here = path.resolve()
    if here in seen:
        names = " -> ".join(p.name for p in (*seen[seen.index(here) :], here))
        raise ValueError(f"{path} is its own {BASE}: {names}.")
    content = dict(content)
    bases = content.pop(BASE, [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        file = path.parent / Path(base).expanduser()
        if not file.is_file():
            raise ValueError(f"{path}: there is no {BASE} file {file}.")
        merge(merged, with_bases(file, read_yaml(file), (*seen, here)))
    merge(merged, content)
    return merged


def merge(target: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge nested values into another mapping, in place."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of nested mappings."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
