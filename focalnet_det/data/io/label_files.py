"""Check label files of semantic segmentation against their class list."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..issue_policies import LABEL_SIZE_DIFFERS, UNREADABLE_LABELS, report_issues
from .image_files import UNREADABLE, evenly_spaced
from .issues import ValidationErrors
from .labels import IGNORE, UnreadableLabelsError, read_values
from .open_image import upright_size

SHIFTED = "label values shifted by one"
UNKNOWN = "unknown label values"
ONE_CLASS = "label folders with pixels of a single class"
NO_CLASS = "label folders without pixels of any class"
LABEL_REMEDIES = {
    UNREADABLE: "Copy the images again, convert them, or remove them.",
    UNREADABLE_LABELS: "Labels are single-channel or palette images of class indices.",
    LABEL_SIZE_DIFFERS: "Resize with nearest-neighbor interpolation, or use the matching file.",
    SHIFTED: "Use --first-label 1 (which ignores 0), or add a first class for 0 to the list.",
    UNKNOWN: "Complete the class list, or set these pixels to 255 (ignored).",
    ONE_CLASS: "A model cannot learn from it. Values are 0, 1, 2, ..., and 255 is ignored (a mask "
    "of 0 and 255 has one class). Check the class list and --first-label.",
    NO_CLASS: "Every pixel is ignored. Check --first-label.",
}
MAX_SAMPLED = 500


def check_label_files(
    subject: object,
    pairs: Sequence[tuple[Path, Path]],
    *,
    num_classes: int,
    first_label: int,
    evaluation: bool,
) -> None:
    """Check up to 500 evenly spaced pairs of image and label file.

    Unknown label values are always errors. Unreadable files and size mismatches are errors in
    evaluation, or if they are the majority.

    Args:
        subject: label folder or dataset that messages begin with.
        pairs: (image, label file).
        num_classes: number of classes.
        first_label: value of the first class in label files.
        evaluation: apply the stricter rules of evaluation.
    Raises: DataError with all errors.
    """
    errors = ValidationErrors(f"Label folder {subject}", LABEL_REMEDIES)
    sample = evenly_spaced(len(pairs), MAX_SAMPLED)
    problems: list[tuple[str, str]] = []
    values: Counter[int] = Counter()
    example: dict[int, Path] = {}
    for image, label in (pairs[index] for index in sample):
        pair_problems, unique = _read(image, label)
        problems += pair_problems
        values.update(unique)
        for value in unique:
            example.setdefault(value, label)
    counts = Counter(kind for kind, _ in problems)
    for kind, detail in problems:
        if evaluation or 2 * counts[kind] > len(sample):
            errors.add(kind, detail)
    if values:
        check_values(values, example, errors, num_classes=num_classes, first_label=first_label)
    errors.raise_if_any()
    report_issues(f"{subject}, a sample", counts, evaluation=evaluation)


def check_values(
    values: Counter[int],
    example: dict[int, Path],
    errors: ValidationErrors,
    *,
    num_classes: int,
    first_label: int,
) -> None:
    """Check the values of all label files against the class list.

    Args:
        values: value -> number of files or pixels.
        example: value -> a file that contains it.
        errors: collects errors of ``LABEL_REMEDIES``.
        num_classes: number of classes.
        first_label: value of the first class in label files.
    """
    last = first_label + num_classes - 1
    unknown = sorted(v for v in values if v != IGNORE and not 0 <= v <= last)
    if unknown == [last + 1] and first_label == 0:
        errors.add(SHIFTED, f"{example[last + 1]} contains {last + 1}, classes are 0 to {last}")
        return
    for value in unknown:
        where = f"{example[value]} contains {value}, classes are {first_label} to {last}"
        errors.add(UNKNOWN, where)
    known = [v for v in values if first_label <= v <= last and v != IGNORE]
    if not unknown and not known:
        errors.add(NO_CLASS, f"values {sorted(values)[:5]}")
    elif not unknown and len(known) == 1 and num_classes > 1:
        errors.add(ONE_CLASS, f"values {sorted(values)[:5]}")


def _read(image: Path, label: Path) -> tuple[list[tuple[str, str]], list[int]]:
    """Return (problem, detail) of a pair, and its label values."""
    try:
        label_map = read_values(label)
    except UnreadableLabelsError as error:
        return [(UNREADABLE_LABELS, str(error))], []
    unique = np.unique(label_map).tolist()
    try:
        size = upright_size(image)
    # Pillow raises many exception types on damaged headers.
    except Exception as error:
        return [(UNREADABLE, f"{image}: {error}")], unique
    if label_map.shape != size:
        height, width = label_map.shape
        detail = f"{label} is {width} x {height}, {image} is {size[1]} x {size[0]}"
        return [(LABEL_SIZE_DIFFERS, detail)], unique
    return [], unique
