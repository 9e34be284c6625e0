"""Pictures of a data set, each opened once: what is odd about them, and which are alike."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..io.read_image import UnreadableImageError, read_rgb
from ..issue_policies import (
    DEEPER_THAN_8_BITS,
    EXIF_ROTATED,
    ISSUE_POLICIES,
    OTHER_COLOURS,
    SEVERAL_PICTURES,
    TRANSPARENT,
)
from .findings import Finding

# Pixels; long side by short side.
SMALLEST_SIDE = 16
LONGEST_SHAPE = 10
# Gray thumbnails of this side are compared.
SIDE = 16
# Bits of 256 that may differ, and the mean difference of gray, 0..255, between pictures that are
# alike: JPEG compression and resizing change less, another photograph of the same place more.
MOST_BITS = 12
MOST_GRAY = 5.0
# Below this deviation of gray, a picture is too plain to be told from others.
PLAIN = 4.0
# Hashes that share 16 bits in one place; more are of plain pictures.
LARGEST_BUCKET = 64

ODD = (EXIF_ROTATED, TRANSPARENT, DEEPER_THAN_8_BITS, OTHER_COLOURS, SEVERAL_PICTURES)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Hold what is compared of a picture.

    Attributes:
        size: height and width of the upright picture, pixels.
        problems: of ``ISSUE_POLICIES``, repaired whenever it is read.
        gray: thumbnail (SIDE, SIDE + 1), 0..255.
    """

    path: str
    size: tuple[int, int]
    problems: tuple[str, ...]
    gray: NDArray[np.float32]

    @property
    def bits(self) -> NDArray[np.bool_]:
        """Whether each pixel of the thumbnail is darker than its right neighbor, (256,)."""
        bits: NDArray[np.bool_] = (self.gray[:, 1:] > self.gray[:, :-1]).reshape(-1)
        return bits


def open_all(paths: Sequence[str]) -> tuple[list[Picture], list[Finding]]:
    """Open pictures.

    Returns: those that can be read, in order; and findings about missing and unreadable ones.
    """
    pictures, missing, unreadable = [], [], []
    for path in dict.fromkeys(paths):
        try:
            image, problems = read_rgb(path)
        except FileNotFoundError:
            missing.append(path)
            continue
        except UnreadableImageError as error:
            unreadable.append(str(error))
            continue
        gray = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
        pictures.append(
            Picture(
                path=path,
                size=(image.height, image.width),
                problems=tuple(problems),
                gray=np.asarray(gray, dtype=np.float32),
            )
        )
    findings = []
    if missing:
        remedy = "Check the image folder, and file_name in the annotation file."
        findings.append(Finding(problem="missing images", remedy=remedy, examples=tuple(missing)))
    if unreadable:
        remedy = "Copy them again, convert them, or remove them."
        findings.append(
            Finding(problem="unreadable images", remedy=remedy, examples=tuple(unreadable))
        )
    return pictures, findings


def odd_pictures(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yield notes on pictures that are converted whenever they are read."""
    for problem in ODD:
        found = [picture.path for picture in pictures if problem in picture.problems]
        if found:
            yield Finding(
                problem=problem,
                remedy=ISSUE_POLICIES[problem].explanation,
                examples=tuple(found),
                fatal=False,
            )


def odd_sizes(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yield notes on pictures that are tiny or very long."""
    tiny = [p.path for p in pictures if min(p.size) < SMALLEST_SIDE]
    long = [p.path for p in pictures if max(p.size) > LONGEST_SHAPE * min(p.size)]
    if tiny:
        yield Finding(
            problem=f"images with a side below {SMALLEST_SIDE} pixels",
            remedy="They are enlarged; look whether they are meant, and no thumbnails.",
            examples=tuple(tiny),
            fatal=False,
        )
    if long:
        yield Finding(
            problem=f"images more than {LONGEST_SHAPE} times as long as wide",
            remedy="Little is left of the short side when they are resized: cut them into tiles.",
            examples=tuple(long),
            fatal=False,
        )


def wrong_sizes(
    pictures: Sequence[Picture], said: Mapping[str, tuple[Any, Any]]
) -> Iterator[Finding]:
    """Yield a finding of pictures whose height and width are not those of the file, by path."""
    found = [
        f"{p.path} is {p.size[1]} x {p.size[0]}, the file says {said[p.path][1]} x "
        f"{said[p.path][0]}"
        for p in pictures
        if p.path in said and None not in said[p.path] and said[p.path] != p.size
    ]
    if found:
        yield Finding(
            problem="images of another size than the file says",
            remedy="Give width and height of the upright image; boxes and masks have to fit it.",
            examples=tuple(found),
        )


def alike(pictures: Sequence[Picture]) -> list[tuple[Picture, Picture]]:
    """Return pairs of pictures that show the same, compressed or resized differently perhaps."""
    textured = [picture for picture in pictures if picture.gray.std() > PLAIN]
    hashes = [np.packbits(picture.bits).view(np.uint16) for picture in textured]
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, words in enumerate(hashes):
        for position, word in enumerate(words.tolist()):
            buckets[position, word].append(index)
    candidates = {
        pair
        for members in buckets.values()
        if 1 < len(members) <= LARGEST_BUCKET
        for pair in combinations(members, 2)
    }
    return [
        (textured[a], textured[b])
        for a, b in sorted(candidates)
        if (textured[a].bits != textured[b].bits).sum() <= MOST_BITS
        and np.abs(textured[a].gray - textured[b].gray).mean() <= MOST_GRAY
    ]


def repeated(pictures: Sequence[Picture], validation: Sequence[Picture] = ()) -> Iterator[Finding]:
    """Yield findings of pictures that occur twice: within a split, and in both."""
    held_out = {picture.path for picture in validation}
    inside: list[str] = []
    across: list[str] = []
    for one, two in alike([*pictures, *validation]):
        both = (one.path in held_out) != (two.path in held_out)
        (across if both else inside).append(f"{one.path} and {two.path}")
    if across:
        yield Finding(
            problem="images of training and validation that are alike",
            remedy="Remove them from one of the two: scores of what was trained on mean nothing.",
            examples=tuple(across),
        )
    if inside:
        yield Finding(
            problem="images that are alike",
            remedy="Keep one of each, unless they are meant.",
            examples=tuple(inside),
            fatal=False,
        )
