"""Check at startup that the processes of a job agree on config, data and versions."""

import platform
from collections.abc import Mapping
from importlib import metadata

import torch
from detectron2.utils import comm

from .. import __version__

MISSING = "nothing"


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compare facts between all processes. Collective: call it in all of them.

    Args:
        facts: name -> value; for multi-line values, the message shows the first differing line.
    Raises: ValueError, equal in all processes, with each differing fact and a process that differs
        from the first.
    """
    everywhere = comm.all_gather(dict(facts))
    differences = []
    for name in dict.fromkeys(name for facts in everywhere for name in facts):
        values = [facts.get(name, MISSING) for facts in everywhere]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            first, second = first_difference(values[0], values[other])
            differences.append(f"{name} ({first!r} in process 0, {second!r} in process {other})")
    if differences:
        raise ValueError(
            f"The {len(everywhere)} processes of this job differ in {'; '.join(differences)}. "
            "Start them with the same command, data and versions."
        )


def first_difference(one: str, other: str) -> tuple[str, str]:
    """Return the first pair of lines in which two texts differ, without indentation."""
    lines = one.splitlines(), other.splitlines()
    length = max(map(len, lines))
    padded = (text + [MISSING] * (length - len(text)) for text in lines)
    for left, right in zip(*padded, strict=True):
        if left != right:
            return left.strip(), right.strip()
    return one, other


def library_versions() -> dict[str, str]:
    """Return the library versions that affect the results of a process."""
    versions = {"the version of Python": platform.python_version()}
    versions["the version of torch"] = torch.__version__
    for name in ("torchvision", "detectron2"):
        try:
            versions[f"the version of {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["the version of focalnet_det"] = __version__
    return versions
