"""Whether label folders hold what their class list says."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..issue_policies import LABEL_SIZE_DIFFERS, UNREADABLE_LABELS, report_issues
from .image_files import UNREADABLE, evenly
from .issues import Faults
from .labels import IGNORE, UnreadableLabelsError, read_values
from .open_image import upright_size

SHIFTED = "label values shifted by one"
UNKNOWN = "label values of no class"
ONE_CLASS = "label folders with pixels of one class alone"
NO_CLASS = "label folders without a pixel of a class"
LABEL_REMEDIES = {
    UNREADABLE: "Copy the images again, convert them, or remove them.",
    UNREADABLE_LABELS: "Labels are single-channel or palette pictures whose values are classes.",
    LABEL_SIZE_DIFFERS: "Resize with nearest-neighbor interpolation, or find the right file.",
    SHIFTED: "Use --first-label 1 (0 is then ignored), or name the class 0 first in the list.",
    UNKNOWN: "Complete the class list, or set these pixels to 255 (ignored).",
    ONE_CLASS: "Nothing can be told from it: values are 0, 1, 2, ..., and 255 is ignored (a mask "
    "of 0 and 255 has one class). Check the class list and --first-label.",
    NO_CLASS: "Every pixel is ignored: check --first-label.",
}
SAMPLE = 500


def check_label_files(
    subject: object,
    pairs: Sequence[tuple[Path, Path]],
    *,
    num_classes: int,
    first_label: int,
    evaluation: bool,
) -> None:
    """Check up to 500 pairs, spread evenly, of image and label file.

    Values of no class are always a fault. Files that cannot be read, or are of another size, are
    one in an evaluation, or if they are most.

    Raises: DataError with all faults.
    """
    faults = Faults(f"Label folder {subject}", LABEL_REMEDIES)
    sample = evenly(len(pairs), SAMPLE)
    found: list[tuple[str, str]] = []
    values: Counter[int] = Counter()
    example: dict[int, Path] = {}
    for index in sample:
        image, label = pairs[index]
        problem, unique = _read(image, label)
        found += problem
        values.update(unique)
        for value in unique:
            example.setdefault(value, label)
    counts = Counter(kind for kind, _ in found)
    for kind, detail in found:
        if evaluation or 2 * counts[kind] > len(sample):
            faults.add(kind, detail)
    if values:
        check_values(values, example, faults, num_classes=num_classes, first_label=first_label)
    faults.stop()
    report_issues(f"{subject}, a sample", counts, evaluation=evaluation)


def check_values(
    values: Counter[int],
    example: dict[int, Path],
    faults: Faults,
    *,
    num_classes: int,
    first_label: int,
) -> None:
    """Check what the values of all label files together say of the class list.

    Args:
        values: value -> how often it was met, in files or in pixels.
        example: a file for each value.
    """
    last = first_label + num_classes - 1
    unknown = sorted(v for v in values if v != IGNORE and not 0 <= v <= last)
    if unknown == [last + 1] and first_label == 0:
        faults.add(SHIFTED, f"{example[last + 1]} holds {last + 1}, the classes are 0 to {last}")
        return
    for value in unknown:
        where = f"{example[value]} holds {value}, the classes are {first_label} to {last}"
        faults.add(UNKNOWN, where)
    known = [v for v in values if first_label <= v <= last and v != IGNORE]
    if not unknown and not known:
        faults.add(NO_CLASS, f"values {sorted(values)[:5]}")
    elif not unknown and len(known) == 1 and num_classes > 1:
        faults.add(ONE_CLASS, f"values {sorted(values)[:5]}")


def _read(image: Path, label: Path) -> tuple[list[tuple[str, str]], list[int]]:
    """Return problems of a pair, with details, and the values of its labels."""
    try:
        found = read_values(label)
    except UnreadableLabelsError as error:
        return [(UNREADABLE_LABELS, str(error))], []
    unique = np.unique(found).tolist()
    try:
        size = upright_size(image)
    # Pillow meets damaged headers with many kinds of error.
    except Exception as error:
        return [(UNREADABLE, f"{image}: {error}")], unique
    if found.shape != size:
        detail = f"{label} is {found.shape[1]} x {found.shape[0]}, {image} {size[1]} x {size[0]}"
        return [(LABEL_SIZE_DIFFERS, detail)], unique
    return [], unique
