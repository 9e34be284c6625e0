"""Translate whole state dicts between layouts, with the rows of ``tables.py``."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

from .tables import LAYOUTS, LINEARS, Names, fill


@dataclass
class Translation:
    """A state dict in official names.

    Attributes:
        layout: key of its former layout.
        prefix: prefix of the backbone in that layout.
        backbone: tensors in official names and shapes.
        others: tensors outside the backbone, with their original names.
        dropped: name in the file -> rule by which it is dropped.
        unknown: names that match no row.
        renamed: official name -> name in the file, where they differ.
    """

    layout: str
    prefix: str
    backbone: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


@cache
def _reading(layout: str) -> tuple[Names, list[tuple[str, str, bool]]]:
    rows = LAYOUTS[layout].rows()
    return Names(theirs for _, theirs, _ in rows), rows


@cache
def _writing(layout: str, post_norm: bool) -> tuple[Names, list[tuple[str, str, bool]]]:
    table = LAYOUTS[layout]
    rows = {ours: (ours, theirs, outside) for ours, theirs, outside in table.rows()}
    if table.post_norm_modules and not post_norm:
        # Later rows of rows() override earlier ones, and those are the post-norm names.
        plain = len(rows)
        rows = {ours: (ours, theirs, out) for ours, theirs, out in table.rows()[:plain]}
    chosen = list(rows.values())
    return Names(ours for ours, _, _ in chosen), chosen


def find(layout: str, prefix: str, name: str) -> str | None:
    """Return the official name for a name in a layout, None if no row matches it."""
    table = LAYOUTS[layout]
    for pattern, replacement in table.aliases:
        name = re.sub(pattern, replacement, name)
    names, rows = _reading(layout)
    inside = name.startswith(prefix)
    match = names.find(name.removeprefix(prefix)) if inside else None
    if match is not None and not rows[match[0]][2]:
        return fill(rows[match[0]][0], match[1])
    match = names.find(name) if table.outside else None
    if match is not None and rows[match[0]][2]:
        return fill(rows[match[0]][0], match[1])
    return None


def detect(names: Iterable[str]) -> tuple[str, str, int]:
    """Return the layout that matches most names, its prefix, and the number of matching names.

    Names outside the backbone decide between layouts with equal backbone names.
    """
    names = list(names)
    # Names that differ only in indices match the same row: one of each kind is looked up.
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    counts = {alike[0]: len(alike) for alike in kinds.values()}
    best, found = (-1, -1), ("official", "", 0)
    for key, layout in LAYOUTS.items():
        companion = bool(layout.companion) and any(re.match(layout.companion, n) for n in counts)
        for prefix in layout.prefixes:
            fitting = sum(n for name, n in counts.items() if find(key, prefix, name) is not None)
            if (fitting, int(companion)) > best:
                best, found = (fitting, int(companion)), (key, prefix, fitting)
    return found


def translate(tensors: Mapping[str, Tensor], layout: str | None = None) -> Translation:
    """Read a state dict in any layout.

    Args:
        tensors: tensors by name, without containers and wrappers.
        layout: key of ``LAYOUTS``; None to detect it.
    Raises: ValueError if two names of the file have the same official name.
    """
    detected, prefix, _ = detect(tensors)
    if layout is not None and layout != detected:
        prefix = _best_prefix(layout, tensors)
    result = Translation(layout or detected, prefix)
    for name, tensor in tensors.items():
        official = find(result.layout, prefix, name)
        rule = _drop_rule(result.layout, prefix, name)
        if official is not None:
            if official in result.backbone:
                raise ValueError(
                    f"{name} and {result.renamed.get(official, official)} are both {official}."
                )
            result.backbone[official] = _official_shape(official, tensor)
            if official != name:
                result.renamed[official] = name
        elif rule is not None:
            result.dropped[name] = rule
        elif prefix and not name.startswith(prefix):
            result.others[name] = tensor
        else:
            result.unknown.append(name)
    return result


def _best_prefix(layout: str, names: Iterable[str]) -> str:
    names = list(names)
    return max(
        LAYOUTS[layout].prefixes,
        key=lambda prefix: sum(find(layout, prefix, name) is not None for name in names),
    )


def _drop_rule(layout: str, prefix: str, name: str) -> str | None:
    for pattern, rule in LAYOUTS[layout].drops:
        if re.search(pattern, name.removeprefix(prefix)):
            return rule
    return None


def _is_linear(official: str) -> bool:
    module, _, parameter = official.rpartition(".")
    return parameter == "weight" and module.endswith(LINEARS)


def _official_shape(official: str, tensor: Tensor) -> Tensor:
    if _is_linear(official) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.reshape(tensor.shape[:2])
    return tensor


def is_post_norm(backbone: Mapping[str, Tensor]) -> bool:
    """Tell whether a network is post-norm; every variant with layer scale is."""
    return any(name.endswith(".gamma_1") for name in backbone)


def write(backbone: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename official names to those of a layout.

    Returns: the tensors, and {official name: rule} for those that the layout does not have.
    Raises: ValueError if the layout cannot be written.
    """
    table = LAYOUTS.get(layout)
    if table is None or not table.writable:
        known = ", ".join(name for name, row in LAYOUTS.items() if row.writable)
        raise ValueError(f"Files in layout {layout!r} cannot be written. Known: {known}.")
    names, rows = _writing(layout, is_post_norm(backbone))
    written: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for name, tensor in backbone.items():
        match = names.find(name)
        if match is None:
            dropped[name] = f"does not exist in {table.title} files"
            continue
        _, theirs, outside = rows[match[0]]
        if table.linear_as_conv and _is_linear(name):
            tensor = tensor[..., None, None]
        written[("" if outside else table.prefixes[0]) + fill(theirs, match[1])] = tensor
    return written, dropped
