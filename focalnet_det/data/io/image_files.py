"""Whether the image files of a data set are there, and a sample of them is what the file says."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..issue_policies import ISSUE_POLICIES, SIZE_DIFFERS, UNREADABLE_IMAGE
from .issues import SHOWN, Faults
from .open_image import upright_size
from .read_image import UnreadableImageError, read_rgb

MISSING = "missing files"
UNREADABLE = "files that cannot be read"
SIZES = "images of another size than the file says"
IMAGE_REMEDIES = {
    MISSING: "Check the folder, and file_name in the annotation file.",
    UNREADABLE: "Copy them again, convert them, or remove them.",
    SIZES: "Give width and height of the upright image; boxes and masks have to fit it too.",
}
# Headers are quick to read, pixels are not.
HEADERS = 500
PICTURES = 32


def evenly(count: int, most: int) -> list[int]:
    """Return up to ``most`` indices of 0..count-1, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def missing_files(paths: Iterable[str]) -> list[str]:
    """Return the paths that do not exist; lists each folder once."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if "://" not in path:  # of another machine
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
    records: Sequence[Mapping[str, Any]], faults: Faults, *, evaluation: bool
) -> Counter[str]:
    """Check that all images are there, and open a sample that is spread evenly.

    Headers of 500 images are read, and 32 are decoded. In training, an unreadable image is drawn
    anew, so that a few are no fault, but most are.

    Args:
        records: with "file_name", and perhaps "height" and "width" of the upright image.
        faults: gets what is found; see ``IMAGE_REMEDIES``.
        evaluation: any image that cannot be used is a fault.
    Returns: {problem of ``ISSUE_POLICIES``: count} of the sample.
    """
    absent = missing_files(str(record["file_name"]) for record in records)
    for number, path in enumerate(absent):
        faults.add(MISSING, hint(path) if number < SHOWN else path)
    missing = set(absent)
    there = [record for record in records if str(record["file_name"]) not in missing]
    found: dict[str, list[str]] = {UNREADABLE: [], SIZES: []}
    decoded = set(evenly(len(there), PICTURES))
    sample = sorted(decoded | set(evenly(len(there), HEADERS)))
    for index in sample:
        problem = _problem(there[index], decode=index in decoded)
        if problem is not None:
            found[problem[0]].append(problem[1])
    for kind, rows in found.items():
        if rows and (evaluation or 2 * len(rows) > len(sample)):
            for row in rows:
                faults.add(kind, row)
    issues = {UNREADABLE_IMAGE: len(found[UNREADABLE]), SIZE_DIFFERS: len(found[SIZES])}
    assert set(issues) <= set(ISSUE_POLICIES)
    return +Counter(issues)


def _problem(record: Mapping[str, Any], *, decode: bool) -> tuple[str, str] | None:
    path = str(record["file_name"])
    try:
        if decode:
            picture, _ = read_rgb(path)
            size = (picture.height, picture.width)
        else:
            size = upright_size(path)
    except UnreadableImageError as error:
        return UNREADABLE, str(error)
    # Pillow meets damaged headers with many kinds of error.
    except Exception as error:
        return UNREADABLE, f"{path}: {error}"
    said = (record.get("height"), record.get("width"))
    if None not in said and said != size:
        return SIZES, f"{path} is {size[1]} x {size[0]}, the file says {said[1]} x {said[0]}"
    return None


def hint(path: str) -> str:
    """Return a missing path, and a file that may be meant."""
    own = Path(path)
    if not own.parent.is_dir():
        return f"{path} (no such folder)"
    same = [
        other
        for other in own.parent.iterdir()
        if other.stem.lower() == own.stem.lower() and other.name != own.name
    ]
    return f"{path} (there is {same[0].name})" if same else path
