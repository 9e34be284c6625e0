"""Check that the image files of a dataset exist, and that a sample matches the annotations."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..issue_policies import ISSUE_POLICIES, SIZE_DIFFERS, UNREADABLE_IMAGE
from .issues import SHOWN, ValidationErrors
from .open_image import upright_size
from .read_image import UnreadableImageError, read_rgb

MISSING = "missing files"
UNREADABLE = "files that cannot be read"
SIZES = "images whose size differs from the annotation file"
IMAGE_REMEDIES = {
    MISSING: "Check the folder, and file_name in the annotation file.",
    UNREADABLE: "Copy them again, convert them, or remove them.",
    SIZES: "Set width and height to those of the upright image; boxes and masks must match it too.",
}
# Reading headers is fast, decoding pixels is not.
MAX_HEADERS = 500
MAX_DECODED = 32


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return up to ``most`` indices of 0..count-1, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def missing_files(paths: Iterable[str]) -> list[str]:
    """Return the paths that do not exist; each folder is listed only once."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if "://" not in path:  # remote files are not checked
            folders[os.path.dirname(path)].append(path)
    missing = []
    for folder, members in folders.items():
        try:
            with os.scandir(folder or ".") as entries:
                names = {entry.name for entry in entries}
        except OSError:
            names = set()
        missing += [path for path in members if os.path.basename(path) not in names]
    return missing


def check_image_files(
    records: Sequence[Mapping[str, Any]], errors: ValidationErrors, *, evaluation: bool
) -> Counter[str]:
    """Check that all images are there, and open a sample that is spread evenly_spaced.

    Headers of 500 images are read, and 32 images are decoded. Training skips unreadable images, so
    they are errors only if they are the majority.

    Args:
        records: with "file_name", and optionally "height" and "width" of the upright image.
        errors: collects errors of ``IMAGE_REMEDIES``.
        evaluation: treat every unusable image as an error.
    Returns: {issue of ``ISSUE_POLICIES``: count} of the sample.
    """
    missing = missing_files(str(record["file_name"]) for record in records)
    for number, path in enumerate(missing):
        errors.add(MISSING, suggest_file(path) if number < SHOWN else path)
    missing_set = set(missing)
    existing = [record for record in records if str(record["file_name"]) not in missing_set]
    details: dict[str, list[str]] = {UNREADABLE: [], SIZES: []}
    decoded = set(evenly_spaced(len(existing), MAX_DECODED))
    sample = sorted(decoded | set(evenly_spaced(len(existing), MAX_HEADERS)))
    for index in sample:
        problem = _problem(existing[index], decode=index in decoded)
        if problem is not None:
            details[problem[0]].append(problem[1])
    for kind, rows in details.items():
        if rows and (evaluation or 2 * len(rows) > len(sample)):
            for row in rows:
                errors.add(kind, row)
    issues = {UNREADABLE_IMAGE: len(details[UNREADABLE]), SIZE_DIFFERS: len(details[SIZES])}
    assert set(issues) <= set(ISSUE_POLICIES)
    return +Counter(issues)


def _problem(record: Mapping[str, Any], *, decode: bool) -> tuple[str, str] | None:
    path = str(record["file_name"])
    try:
        if decode:
            rgb, _ = read_rgb(path)
            size = (rgb.height, rgb.width)
        else:
            size = upright_size(path)
    except UnreadableImageError as error:
        return UNREADABLE, str(error)
    # Pillow raises many exception types on damaged headers.
    except Exception as error:
        return UNREADABLE, f"{path}: {error}"
    listed = (record.get("height"), record.get("width"))
    if None not in listed and listed != size:
        return SIZES, f"{path} is {size[1]} x {size[0]}, the file lists {listed[1]} x {listed[0]}"
    return None


def suggest_file(path: str) -> str:
    """Return a missing path, with a hint at a file of a similar name."""
    missing = Path(path)
    if not missing.parent.is_dir():
        return f"{path} (no such folder)"
    similar = [
        other
        for other in missing.parent.iterdir()
        if other.stem.lower() == missing.stem.lower() and other.name != missing.name
    ]
    return f"{path} (did you mean {similar[0].name}?)" if similar else path
