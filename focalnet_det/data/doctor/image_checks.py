"""Check the images of a dataset: unusual formats and sizes, and near-duplicates."""

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
    MULTIPLE_FRAMES,
    NOT_RGB,
    TRANSPARENT,
)
from .findings import Finding

MIN_SIDE = 16  # pixels
MAX_ASPECT_RATIO = 10  # long side / short side
# Side of the grayscale thumbnails that are compared.
THUMBNAIL_SIDE = 16
# Thresholds of near-duplicates: hash bits (of 256) that differ, and mean difference of gray values
# (0..255). JPEG compression and resizing stay below, other photographs of the same scene above.
MAX_BIT_DIFFERENCE = 12
MAX_GRAY_DIFFERENCE = 5.0
# Images with a smaller standard deviation of gray values are too uniform to be distinguished.
MIN_CONTRAST = 4.0
# Larger buckets of hashes that share a 16-bit word come from uniform images.
MAX_BUCKET_SIZE = 64

CONVERSIONS = (EXIF_ROTATED, TRANSPARENT, DEEPER_THAN_8_BITS, NOT_RGB, MULTIPLE_FRAMES)


@dataclass(frozen=True, kw_only=True)
class ImageSummary:
    """Properties of an image that the checks compare.

    Attributes:
        path: image file.
        size: height and width of the upright image, pixels.
        problems: issues of ``ISSUE_POLICIES`` that are repaired on every read.
        gray: thumbnail, (THUMBNAIL_SIDE, THUMBNAIL_SIDE + 1), 0..255.
    """

    path: str
    size: tuple[int, int]
    problems: tuple[str, ...]
    gray: NDArray[np.float32]

    @property
    def bits(self) -> NDArray[np.bool_]:
        """Difference hash, (256,): whether each thumbnail pixel is darker than its right neighbor.

        Source: N. Krawetz, "Kind of Like That", The Hacker Factor blog, 2013 (dHash).
        """
        bits: NDArray[np.bool_] = (self.gray[:, 1:] > self.gray[:, :-1]).reshape(-1)
        return bits


def read_summaries(paths: Sequence[str]) -> tuple[list[ImageSummary], list[Finding]]:
    """Read images and summarize them.

    Returns: summaries of readable images, in order; and findings on missing and unreadable ones.
    """
    summaries, missing, unreadable = [], [], []
    for path in dict.fromkeys(paths):
        try:
            image, problems = read_rgb(path)
        except FileNotFoundError:
            missing.append(path)
            continue
        except UnreadableImageError as error:
            unreadable.append(str(error))
            continue
        gray = image.convert("L").resize((THUMBNAIL_SIDE + 1, THUMBNAIL_SIDE), Image.Resampling.BOX)
        summaries.append(
            ImageSummary(
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
        remedy = "Copy them again, convert them to a supported format, or remove them."
        findings.append(
            Finding(problem="unreadable images", remedy=remedy, examples=tuple(unreadable))
        )
    return summaries, findings


def conversion_notes(summaries: Sequence[ImageSummary]) -> Iterator[Finding]:
    """Yield notes on images that are converted on every read."""
    for problem in CONVERSIONS:
        paths = [summary.path for summary in summaries if problem in summary.problems]
        if paths:
            yield Finding(
                problem=problem,
                remedy=ISSUE_POLICIES[problem].explanation,
                examples=tuple(paths),
                fatal=False,
            )


def unusual_size_notes(summaries: Sequence[ImageSummary]) -> Iterator[Finding]:
    """Yield notes on images that are tiny or have an extreme aspect ratio."""
    tiny = [s.path for s in summaries if min(s.size) < MIN_SIDE]
    long = [s.path for s in summaries if max(s.size) > MAX_ASPECT_RATIO * min(s.size)]
    if tiny:
        yield Finding(
            problem=f"images with a side below {MIN_SIDE} pixels",
            remedy="They are upsampled. Check that they are not thumbnails.",
            examples=tuple(tiny),
            fatal=False,
        )
    if long:
        yield Finding(
            problem=f"images with an aspect ratio above {MAX_ASPECT_RATIO}",
            remedy="Resizing leaves few pixels on the short side. Cut them into tiles.",
            examples=tuple(long),
            fatal=False,
        )


def size_mismatches(
    summaries: Sequence[ImageSummary], listed_sizes: Mapping[str, tuple[Any, Any]]
) -> Iterator[Finding]:
    """Yield a finding on images whose size differs from the annotation file.

    Args:
        summaries: of the images.
        listed_sizes: path -> height and width in the annotation file, pixels; None if absent.
    """
    mismatches = []
    for summary in summaries:
        listed = listed_sizes.get(summary.path, (None, None))
        if None not in listed and listed != summary.size:
            height, width = summary.size
            mismatches.append(
                f"{summary.path} is {width} x {height}, the file lists {listed[1]} x {listed[0]}"
            )
    if mismatches:
        yield Finding(
            problem="images whose size differs from the annotation file",
            remedy="Set width and height to those of the upright image; boxes and masks must "
            "match it too.",
            examples=tuple(mismatches),
        )


def near_duplicates(summaries: Sequence[ImageSummary]) -> list[tuple[ImageSummary, ImageSummary]]:
    """Return pairs of images with the same content, up to compression and resizing."""
    textured = [summary for summary in summaries if summary.gray.std() > MIN_CONTRAST]
    hashes = [np.packbits(summary.bits).view(np.uint16) for summary in textured]
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, words in enumerate(hashes):
        for position, word in enumerate(words.tolist()):
            buckets[position, word].append(index)
    candidates = {
        pair
        for members in buckets.values()
        if 1 < len(members) <= MAX_BUCKET_SIZE
        for pair in combinations(members, 2)
    }
    return [
        (textured[a], textured[b])
        for a, b in sorted(candidates)
        if (textured[a].bits != textured[b].bits).sum() <= MAX_BIT_DIFFERENCE
        and np.abs(textured[a].gray - textured[b].gray).mean() <= MAX_GRAY_DIFFERENCE
    ]


def duplicate_findings(
    training: Sequence[ImageSummary], validation: Sequence[ImageSummary] = ()
) -> Iterator[Finding]:
    """Yield findings on near-duplicate images, within a split and across splits."""
    validation_paths = {summary.path for summary in validation}
    within: list[str] = []
    across: list[str] = []
    for first, second in near_duplicates([*training, *validation]):
        is_leak = (first.path in validation_paths) != (second.path in validation_paths)
        (across if is_leak else within).append(f"{first.path} and {second.path}")
    if across:
        yield Finding(
            problem="near-duplicate images shared by training and validation",
            remedy="Remove them from one of the two; scores on training images are meaningless.",
            examples=tuple(across),
        )
    if within:
        yield Finding(
            problem="near-duplicate images",
            remedy="Remove all but one of each, unless they are intended.",
            examples=tuple(within),
            fatal=False,
        )
