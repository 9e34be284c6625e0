"""Label maps: files in which a pixel's value is its class."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .open_image import number_of_pages, open_picture

IGNORE = 255
# Grey or black and white, palette (whose index is the class), 16 and 32 bits.
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")


class UnreadableLabelsError(OSError):
    """A file is there, but it is no label map."""


class LabelReader(Protocol):
    """How a file becomes classes: ``label_rule`` of a record."""

    def read(self, path: str | Path) -> NDArray[np.int64]:
        """Classes (H, W), 255 where there is none."""


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How the values of a label file become classes 0..num_classes-1.

    Attributes:
        num_classes: values of no class are an error; None for 255, as many as there can be.
        first_label: value of the first class. With 1, as in ADE20K, 0 is ignored.
    """

    num_classes: int | None = None
    first_label: int = 0

    def __post_init__(self) -> None:
        most = IGNORE - self.first_label
        if self.num_classes is not None and self.num_classes > most:
            raise ValueError(
                f"{self.num_classes} classes: labels can tell {most} apart, since {IGNORE} is "
                "ignored."
            )

    def read(self, path: str | Path) -> NDArray[np.int64]:
        """Classes of a label file; errors as in ``read_values`` and ``classes``."""
        return self.classes(read_values(path), path)

    def classes(self, values: NDArray[Any], path: str | Path) -> NDArray[np.int64]:
        """Values of a file (H, W) -> classes, 255 where there is none.

        Raises: ValueError that names the file and the values that are no class.
        """
        values = values.astype(np.int64)
        count = IGNORE if self.num_classes is None else self.num_classes
        ignored = (values == IGNORE) | ((values >= 0) & (values < self.first_label))
        labels = np.where(ignored, IGNORE, values - self.first_label)
        unknown = values[((labels < 0) | (labels >= count)) & ~ignored]
        if unknown.size:
            found = ", ".join(map(str, np.unique(unknown)[:5].tolist()))
            last = self.first_label + count - 1
            raise ValueError(
                f"{path} holds {found}, but the {count} classes are numbered {self.first_label} "
                f"to {last} (255 is ignored). Check the class list, and --first-label."
            )
        return labels


def read_values(path: str | Path) -> NDArray[Any]:
    """The values of a label file, (H, W).

    Raises: UnreadableLabelsError if it is empty, damaged or a colour picture, FileNotFoundError if
        it is absent.
    """
    try:
        with open_picture(path) as image:
            pages = number_of_pages(image)
            image.load()
            mode, values = image.mode, np.array(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Label file {path} does not exist.") from error
    except (MemoryError, IsADirectoryError, PermissionError):
        raise
    # Pillow's decoders meet damage with many kinds of error.
    except Exception as error:
        raise UnreadableLabelsError(f"Cannot read label file {path}: {error}.") from error
    if pages > 1:
        raise UnreadableLabelsError(
            f"Label file {path} has {pages} pages: save the one that is meant alone."
        )
    if mode not in LABEL_MODES:
        raise UnreadableLabelsError(
            f"Label file {path} is a colour picture ({mode}): labels are the values of a "
            "single-channel or palette picture."
        )
    return values


def pixel_counts(files: Iterable[str | Path], rule: LabelRule) -> NDArray[np.int64]:
    """Pixels of each class in label files, (K,); files that cannot be read are left out.

    Raises: ValueError if a file holds values of no class.
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
    """Loss weights that let rare classes count more: sqrt(median frequency / frequency).

    Args:
        counts: pixels of each class, (K,).
        largest: weight.
    Returns: K weights, two decimals; 1 for classes that do not occur.
    Source: arXiv:1411.4734, section 6.3.2 (median frequency balancing), here with a square root.
    """
    there = counts > 0
    weights = np.ones(len(counts))
    weights[there] = np.sqrt(np.median(counts[there]) / counts[there])
    return [round(float(weight), 2) for weight in weights.clip(0.01, largest)]


def read_labels(path: str | Path, rule: LabelReader | None = None) -> NDArray[np.int64]:
    """Classes of a file, (H, W), 255 where there is none.

    Args:
        rule: None takes the values of a label file as they are.
    Raises: UnreadableLabelsError if the file is empty, damaged or no label map, FileNotFoundError
        if it is absent, ValueError if it holds what the rule does not know.
    """
    return (rule or LabelRule()).read(path)
