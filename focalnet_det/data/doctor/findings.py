"""Collect findings on datasets, and check pairs of images and label files."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..instances.mappers import size_mismatch_message
from ..io.issues import ValidationErrors
from ..io.labels import IGNORE, UnreadableLabelsError, read_values
from ..io.read_image import UnreadableImageError, read_rgb
from ..semantic.label_folders import LABEL_SUFFIXES, ClassList, files_by_stem


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of problem in a dataset.

    Attributes:
        problem: description.
        remedy: what to do about it.
        examples: some of the affected files or classes.
        fatal: whether it makes the data unusable for training or evaluation.
        count: number of occurrences; None for the number of examples.
    """

    problem: str
    remedy: str
    examples: tuple[str, ...]
    fatal: bool = True
    count: int | None = None

    def __str__(self) -> str:
        count = len(self.examples) if self.count is None else self.count
        shown = ", ".join(self.examples[:3]) + (", ..." if count > 3 and self.examples else "")
        kind = "ERROR" if self.fatal else "note"
        where = f": {shown}" if shown else ""
        return f"{kind}: {self.problem} ({count}){where}\n  {self.remedy}"


def findings_from_errors(errors: ValidationErrors) -> Iterator[Finding]:
    """Yield a fatal finding for each kind of error."""
    for kind, remedy in errors.remedies.items():
        if count := errors.counts.get(kind, 0):
            yield Finding(
                problem=f"{errors.subject}: {kind}",
                remedy=remedy,
                examples=tuple(errors.rows[kind]),
                count=count,
            )


def verify_sem_seg(images: str | Path, labels: str | Path, classes: ClassList) -> list[Finding]:
    """Check folders of images and label maps.

    Args:
        images: image folder.
        labels: folder of label files.
        classes: class list of the label values.
    Returns: findings, none if the data is valid.
    Raises: FileNotFoundError if a folder is missing, ValueError if file names are ambiguous.
    """
    image_files, label_files = files_by_stem(images, None), files_by_stem(labels, LABEL_SUFFIXES)
    examples: dict[str, list[str]] = defaultdict(list)
    examples["image"] = [str(image_files[s]) for s in image_files.keys() - label_files.keys()]
    examples["label"] = [str(label_files[s]) for s in label_files.keys() - image_files.keys()]
    values: Counter[int] = Counter()
    for stem in sorted(image_files.keys() & label_files.keys()):
        for key, detail in check_pair(image_files[stem], label_files[stem], values):
            examples[key].append(detail)
    findings = [
        Finding(problem=problem, remedy=remedy, examples=tuple(sorted(examples[key])), fatal=fatal)
        for key, (problem, remedy, fatal) in PAIR_PROBLEMS.items()
        if examples[key]
    ]
    return findings + list(check_label_values(values, classes))


# Key -> (problem, remedy, fatal).
PAIR_PROBLEMS = {
    "image": ("images without labels", "They are ignored. Add labels of the same name.", False),
    "label": ("labels without image", "They are ignored. Add images of the same name.", False),
    "unreadable image": ("unreadable images", "Copy them again, or remove them.", True),
    "unreadable label": (
        "unreadable label files",
        "Labels are grayscale or palette images of class indices. Convert colors to indices.",
        True,
    ),
    "size": (
        "labels whose size differs from the image",
        "Resize the labels with nearest-neighbor interpolation, or use the matching file. Sizes "
        "are those of the image after EXIF rotation.",
        True,
    ),
    "nothing": ("labels that are 255 everywhere", "They have no effect. Remove them.", False),
}


def check_pair(image: Path, labels: Path, values: Counter[int]) -> Iterator[tuple[str, str]]:
    """Yield keys of ``PAIR_PROBLEMS`` with details; add the pixel counts of label values."""
    try:
        rgb, _ = read_rgb(image)
        size = (rgb.height, rgb.width)
    except UnreadableImageError:
        yield "unreadable image", str(image)
        return
    try:
        label_map = read_values(labels)
    except UnreadableLabelsError:
        yield "unreadable label", str(labels)
        return
    if label_map.shape != size:
        yield "size", size_mismatch_message(labels, label_map.shape, size)
    unique, counts = np.unique(label_map, return_counts=True)
    values.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))
    if unique.tolist() == [IGNORE]:
        yield "nothing", str(labels)


def check_label_values(values: Counter[int], classes: ClassList) -> Iterator[Finding]:
    """Yield findings on label values that do not match the class list.

    Args:
        values: pixels of each value, over all label files.
        classes: class list.
    """
    first, last = classes.first_label, classes.first_label + len(classes.names) - 1
    unlisted = sorted(v for v in values if v != IGNORE and not 0 <= v <= last)
    if unlisted == [last + 1] and first == 0:
        yield Finding(
            problem="labels shifted by one",
            remedy=f"Values range from {min(v for v in values if v >= 0)} to {last + 1}. Use "
            "--first-label 1 (which ignores 0), or add a first class for 0 to the list.",
            examples=(str(last + 1),),
        )
        return
    if unlisted:
        yield Finding(
            problem="unknown label values",
            remedy=f"The {len(classes.names)} classes are {first} to {last}, and 255 is ignored. "
            "Complete the class list, or set these pixels to 255.",
            examples=tuple(map(str, unlisted)),
        )
    share = values[0] / max(sum(values.values()), 1)
    if first == 1 and last not in values and share > 0.2:
        yield Finding(
            problem="labels that may be shifted by one",
            remedy=f"Value 0, which --first-label 1 ignores, covers {share:.0%} of the pixels, and "
            f"{last} does not occur. If 0 is a class, use --first-label 0.",
            examples=("0",),
            fatal=False,
        )
    yield from _classes_without_pixels(values, classes)


def _classes_without_pixels(values: Counter[int], classes: ClassList) -> Iterator[Finding]:
    """Yield a finding if classes of the list occur in no label file."""
    first = classes.first_label
    empty = [n for i, n in enumerate(classes.names) if i + first not in values]
    if empty:
        yield Finding(
            problem="classes without pixels",
            remedy="They cannot be learned or evaluated. Add images, or check the class list.",
            examples=tuple(empty),
            fatal=False,
        )


def report(findings: Sequence[Finding]) -> str:
    """Format findings as one paragraph each, fatal ones first."""
    if not findings:
        return "No problems found."
    return "\n".join(map(str, sorted(findings, key=lambda finding: not finding.fatal)))
