"""Read label maps of semantic segmentation, and map their values to classes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .open_image import num_frames, open_image

IGNORE = 255
# Bilevel, grayscale, palette (the index is the label), and integers of 32 and 16 bits.
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")


class UnreadableLabelsError(OSError):
    """Signal that an existing file is not a label map."""


class LabelReader(Protocol):
    """Reader that maps a label file to classes, such as ``label_rule`` of a record."""

    def read(self, path: str | Path) -> NDArray[np.int64]:
        """Read the classes of a file, (H, W), 255 for ignored pixels."""


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """Mapping of the values of a label file to classes 0..num_classes-1.

    Attributes:
        num_classes: number of classes; None for the maximum, 255.
        first_label: value of the first class. With 1, as in ADE20K, 0 is ignored.
    """

    num_classes: int | None = None
    first_label: int = 0

    def __post_init__(self) -> None:
        limit = IGNORE - self.first_label
        if self.num_classes is not None and self.num_classes > limit:
            raise ValueError(
                f"{self.num_classes} classes exceed the limit of {limit} in label files ({IGNORE} "
                "is ignored)."
            )

    def read(self, path: str | Path) -> NDArray[np.int64]:
        """Read the classes of a label file; raises as ``read_values`` and ``classes``."""
        return self.classes(read_values(path), path)

    def classes(self, values: NDArray[Any], path: str | Path) -> NDArray[np.int64]:
        """Map label values to classes.

        Args:
            values: pixel values of the file, (H, W).
            path: the file, for messages.
        Returns: (H, W), 255 for ignored pixels.
        Raises: ValueError with the file and its unknown values.
        """
        values = values.astype(np.int64)
        count = IGNORE if self.num_classes is None else self.num_classes
        ignored = (values == IGNORE) | ((values >= 0) & (values < self.first_label))
        labels = np.where(ignored, IGNORE, values - self.first_label)
        unknown = values[((labels < 0) | (labels >= count)) & ~ignored]
        if unknown.size:
            examples = ", ".join(map(str, np.unique(unknown)[:5].tolist()))
            last = self.first_label + count - 1
            raise ValueError(
                f"{path} contains {examples}, but the {count} classes are numbered "
                f"{self.first_label} to {last} (255 is ignored). Check the class list and "
                "--first-label."
            )
        return labels


def read_values(path: str | Path) -> NDArray[Any]:
    """Read the pixel values of a label file, (H, W).

    Raises: UnreadableLabelsError if it is empty, damaged, multi-page or a color image;
        FileNotFoundError if it does not exist.
    """
    try:
        with open_image(path) as image:
            pages = num_frames(image)
            image.load()
            mode, values = image.mode, np.array(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Label file {path} does not exist.") from error
    except (MemoryError, IsADirectoryError, PermissionError):
        raise
    # Pillow raises many exception types on damaged files.
    except Exception as error:
        raise UnreadableLabelsError(f"Cannot read label file {path}: {error}.") from error
    if pages > 1:
        raise UnreadableLabelsError(
            f"Label file {path} has {pages} pages. Save the one with labels separately."
        )
    if mode not in LABEL_MODES:
        raise UnreadableLabelsError(
            f"Label file {path} is a color image ({mode}). Labels are the pixel values of a "
            "single-channel or palette image."
        )
    return values


def pixel_counts(files: Iterable[str | Path], rule: LabelRule) -> NDArray[np.int64]:
    """Count the pixels of each class in label files, skipping unreadable ones.

    Returns: int64 (K,).
    Raises: ValueError if a file contains unknown values.
    """
    assert rule.num_classes is not None
    counts = np.zeros(rule.num_classes, dtype=np.int64)
    for path in files:
        try:
            labels = read_labels(path, rule)
        except UnreadableLabelsError:
            continue
        counts += np.bincount(labels[labels != IGNORE], minlength=rule.num_classes)
    return counts


def balanced_weights(counts: NDArray[np.int64], largest: float = 10.0) -> list[float]:
    """Compute loss weights that emphasize rare classes: sqrt(median frequency / frequency).

    Args:
        counts: pixels of each class, (K,).
        largest: upper bound of the weights.
    Returns: K weights, rounded to two decimals; 1 for classes that do not occur.
    Source: arXiv:1411.4734, section 6.3.2 (median frequency balancing), here with a square root.
    """
    present = counts > 0
    weights = np.ones(len(counts))
    weights[present] = np.sqrt(np.median(counts[present]) / counts[present])
    return [round(float(weight), 2) for weight in weights.clip(0.01, largest)]


def read_labels(path: str | Path, rule: LabelReader | None = None) -> NDArray[np.int64]:
    """Read the classes of a label file, (H, W), 255 for ignored pixels.

    Args:
        path: label file.
        rule: mapping of values to classes; None for the identity.
    Raises: UnreadableLabelsError if the file is empty, damaged or not a label map;
        FileNotFoundError if it does not exist; ValueError if it contains unknown values.
    """
    return (rule or LabelRule()).read(path)
