"""What is wrong with a data set, and how to mend it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..instances.mappers import size_message
from ..io.issues import Faults
from ..io.labels import IGNORE, UnreadableLabelsError, read_values
from ..io.read_image import UnreadableImageError, read_rgb
from ..semantic.label_folders import LABEL_SUFFIXES, ClassList, files_by_stem


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of problem.

    Attributes:
        problem: what it is.
        remedy: what to do.
        examples: of the files or classes that have it.
        fatal: whether training or evaluation cannot use the data as it is.
        count: how many have it; None for as many as there are examples.
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


def findings_of_faults(faults: Faults) -> Iterator[Finding]:
    """Yield a fatal finding for each kind of fault."""
    for kind, remedy in faults.remedies.items():
        if count := faults.counts.get(kind, 0):
            yield Finding(
                problem=f"{faults.subject}: {kind}",
                remedy=remedy,
                examples=tuple(faults.rows[kind]),
                count=count,
            )


def verify_sem_seg(images: str | Path, labels: str | Path, classes: ClassList) -> list[Finding]:
    """Checks folders of images and label maps.

    Args:
        classes: that the label values stand for.
    Returns: findings, none if all is well.
    Raises: FileNotFoundError if a folder is missing, ValueError if file names are ambiguous.
    """
    image_files, label_files = files_by_stem(images, None), files_by_stem(labels, LABEL_SUFFIXES)
    found: dict[str, list[str]] = defaultdict(list)
    found["image"] = [str(image_files[s]) for s in image_files.keys() - label_files.keys()]
    found["label"] = [str(label_files[s]) for s in label_files.keys() - image_files.keys()]
    values: Counter[int] = Counter()
    for stem in sorted(image_files.keys() & label_files.keys()):
        for key, detail in problems_of_pair(image_files[stem], label_files[stem], values):
            found[key].append(detail)
    findings = [
        Finding(problem=problem, remedy=remedy, examples=tuple(sorted(found[key])), fatal=fatal)
        for key, (problem, remedy, fatal) in PAIR_PROBLEMS.items()
        if found[key]
    ]
    return findings + list(problems_of_values(values, classes))


# Key: problem, remedy, whether it is fatal.
PAIR_PROBLEMS = {
    "image": ("images without labels", "They are left out: add labels of the same name.", False),
    "label": ("labels without image", "They are left out: add images of the same name.", False),
    "unreadable image": ("unreadable images", "Copy them again, or remove them.", True),
    "unreadable label": (
        "unreadable label files",
        "Labels are grey or palette pictures whose values are classes; save colours as values.",
        True,
    ),
    "size": (
        "labels of another size than the image",
        "Resize the label with nearest-neighbour interpolation, or find the right one. An image "
        "that EXIF rotates is taken upright.",
        True,
    ),
    "nothing": ("labels that are 255 everywhere", "They teach nothing: remove them.", False),
}


def problems_of_pair(image: Path, labels: Path, values: Counter[int]) -> Iterator[tuple[str, str]]:
    """Keys of ``PAIR_PROBLEMS`` with details; adds the pixels of each label value."""
    try:
        picture, _ = read_rgb(image)
        size = (picture.height, picture.width)
    except UnreadableImageError:
        yield "unreadable image", str(image)
        return
    try:
        found = read_values(labels)
    except UnreadableLabelsError:
        yield "unreadable label", str(labels)
        return
    if found.shape != size:
        yield "size", size_message(labels, found.shape, size)
    unique, counts = np.unique(found, return_counts=True)
    values.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))
    if unique.tolist() == [IGNORE]:
        yield "nothing", str(labels)


def problems_of_values(values: Counter[int], classes: ClassList) -> Iterator[Finding]:
    """What the values of all labels together say about the class list."""
    count, first = len(classes.names), classes.first_label
    last = first + count - 1
    unlisted = sorted(v for v in values if v != IGNORE and not 0 <= v <= last)
    if unlisted == [last + 1] and first == 0:
        yield Finding(
            problem="labels shifted by one",
            remedy=f"Values run from {min(v for v in values if v >= 0)} to {last + 1}: use "
            "--first-label 1 (0 is then ignored), or name the class 0 first in the list.",
            examples=(str(last + 1),),
        )
        return
    if unlisted:
        yield Finding(
            problem="label values of no class",
            remedy=f"The {count} classes are {first} to {last}, and 255 is ignored: complete the "
            "class list, or set these pixels to 255.",
            examples=tuple(map(str, unlisted)),
        )
    share = values[0] / max(sum(values.values()), 1)
    if first == 1 and last not in values and share > 0.2:
        yield Finding(
            problem="labels that may be shifted by one",
            remedy=f"0, which is ignored with --first-label 1, covers {share:.0%} of the pixels "
            f"and {last} none: if 0 is a class, use --first-label 0.",
            examples=("0",),
            fatal=False,
        )
    empty = [n for i, n in enumerate(classes.names) if i + first not in values]
    if empty:
        yield Finding(
            problem="classes without a pixel",
            remedy="They cannot be learned or measured: add images, or check the class list.",
            examples=tuple(empty),
            fatal=False,
        )


def report(findings: Sequence[Finding]) -> str:
    """One paragraph a finding, fatal ones first."""
    if not findings:
        return "No problem was found."
    return "\n".join(map(str, sorted(findings, key=lambda finding: not finding.fatal)))
