"""Register semantic segmentation datasets: a folder of images and a folder of label maps."""

import errno
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog

from ..io.label_files import check_label_files
from ..io.labels import IGNORE, LabelRule
from ..io.open_image import image_suffixes
from ..registry import register_or_replace
from ..shapes.export import ADE_NAMES, COLORS
from ..shapes.generate import default_root
from ..shapes.scene import STUFF_CLASSES, THING_CLASSES
from .ade20k_colors import ADE20K_COLORS

logger = logging.getLogger("focalnet_det")

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Class names in order, and the value of the first class in label files."""

    names: tuple[str, ...]
    first_label: int = 0

    @property
    def rule(self) -> LabelRule:
        """Mapping of label values to classes."""
        return LabelRule(num_classes=len(self.names), first_label=self.first_label)


def read_class_list(path: str | Path, first_label: int | None = None) -> ClassList:
    """Read a file of class names.

    Supported formats are one name per line, ADE20K's table (objectInfo150.txt), and JSON: a list of
    names, or of objects with "name" and optionally "id". Ids are the values in label files: 0, 1,
    2, ... or 1, 2, 3, ...

    Args:
        path: text or JSON file.
        first_label: value of the first class, if the file has no ids; None for 0.
    Raises: ValueError if the file has another format, or its ids and ``first_label`` disagree.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Class list {path} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
        rows = numbered_json(text) if path.suffix == ".json" else numbered_lines(text)
    except (UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a class list: {error}.") from error
    names = tuple(name for _, name in rows)
    if len(set(names)) != len(names) or not all(names):
        raise ValueError(f"Class names in {path} must be unique and not empty.")
    if len(names) > IGNORE - (first_label or 0):
        raise ValueError(
            f"{path} lists {len(names)} classes, but label values of classes must be below 255."
        )
    ids = [number for number, _ in rows if number is not None]
    if not ids:
        return ClassList(names=names, first_label=first_label or 0)
    if ids != list(range(ids[0], ids[0] + len(names))) or ids[0] not in (0, 1):
        raise ValueError(f"{path}: ids must be 0, 1, 2, ... or 1, 2, 3, ... without gaps.")
    if first_label not in (None, ids[0]):
        raise ValueError(f"Ids in {path} start at {ids[0]}, but the first label is {first_label}.")
    return ClassList(names=names, first_label=ids[0])


def numbered_json(text: str) -> list[tuple[int | None, str]]:
    """Parse a JSON list into (id or None, name) of each class, in order of id."""
    content = json.loads(text)
    if not isinstance(content, list) or not content:
        raise ValueError("expected a JSON list")
    if all(isinstance(item, str) for item in content):
        return [(None, item) for item in content]
    if any("id" in item for item in content):
        return sorted((int(item["id"]), str(item["name"])) for item in content)
    return [(None, str(item["name"])) for item in content]


def numbered_lines(text: str) -> list[tuple[int | None, str]]:
    """Parse a text file into (id or None, name) of each class."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the file is empty")
    header = lines[0].split("\t")
    if header[0] == "Idx" and header[-1] == "Name":
        cells = [line.split("\t") for line in lines[1:]]
        return [(int(row[0]), row[-1].strip()) for row in cells]
    return [(None, line.strip()) for line in lines]


def paired_files(images: str | Path, labels: str | Path) -> list[tuple[Path, Path]]:
    """Pair images with label files of the same relative path, ignoring suffixes.

    Raises: FileNotFoundError if a folder is missing, ValueError if no file has a counterpart.
    """
    image_files, label_files = files_by_stem(images, None), files_by_stem(labels, LABEL_SUFFIXES)
    common = sorted(image_files.keys() & label_files.keys())
    if not common:
        raise ValueError(
            f"No image in {images} ({len(image_files)} files) has a label file of the same name in "
            f"{labels} ({len(label_files)} files)."
        )
    unpaired = sorted(image_files.keys() ^ label_files.keys())
    if unpaired:
        logger.warning(
            "%s and %s: %d files without a counterpart are ignored, such as %s.",
            images,
            labels,
            len(unpaired),
            unpaired[0],
        )
    return [(image_files[stem], label_files[stem]) for stem in common]


def files_by_stem(folder: str | Path, suffixes: Sequence[str] | None) -> dict[str, Path]:
    """Map the relative path without suffix to each image file below a folder.

    Args:
        folder: searched recursively.
        suffixes: file extensions; None for all readable image formats.
    Raises: FileNotFoundError if the folder does not exist, ValueError if two files differ only in
        their suffix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(folder))
    known = set(suffixes or image_suffixes())
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in known or path.name.startswith("."):
            continue
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in files:
            raise ValueError(
                f"{files[stem]} and {path} differ only in their extension. Remove one of them."
            )
        files[stem] = path
    return files


def sem_seg_records(
    images: str | Path, labels: str | Path, rule: LabelRule
) -> list[dict[str, Any]]:
    """Build records in Detectron2's format; raises as :func:`paired_files`."""
    return [
        {
            "file_name": str(image),
            "image_id": index,
            "sem_seg_file_name": str(label),
            "label_rule": rule,
        }
        for index, (image, label) in enumerate(paired_files(images, labels))
    ]


def register_label_folders(
    name: str,
    images: str | Path,
    labels: str | Path,
    classes: ClassList,
    *,
    evaluation: bool = False,
) -> int:
    """Check a sample of the files in a pair of folders, and register it.

    Args:
        name: name in Detectron2's catalogs; an existing dataset of this name is replaced.
        images: image folder.
        labels: folder of label files.
        classes: class list of the label values.
        evaluation: apply the stricter rules of evaluation.
    Returns: number of images.
    Raises: ValueError with all errors of the sample, or if no file names match; FileNotFoundError
        if a folder is missing.
    """
    pairs = paired_files(images, labels)
    check_label_files(
        labels,
        pairs,
        num_classes=len(classes.names),
        first_label=classes.first_label,
        evaluation=evaluation,
    )
    register_sem_seg(name, images, labels, classes)
    return len(pairs)


def register_sem_seg(
    name: str,
    images: str | Path,
    labels: str | Path,
    classes: ClassList,
    *,
    colors: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Register a pair of folders, which are read when the records are first requested.

    Args:
        name: name in Detectron2's catalogs; an existing dataset of this name is replaced.
        images: image folder.
        labels: folder of label files.
        classes: class list of the label values.
        colors: RGB of each class, 0..255, for visualization; None for none.
    """
    register_or_replace(name, lambda: sem_seg_records(images, labels, classes.rule))
    MetadataCatalog.get(name).set(
        stuff_classes=list(classes.names),
        stuff_colors=None if colors is None else [tuple(color) for color in colors],
        image_root=str(images),
        sem_seg_root=str(labels),
        evaluator_type="sem_seg",
        ignore_label=IGNORE,
    )


def register_shapes_sem_seg() -> None:
    """Register ``shapes_sem_seg_train`` and ``shapes_sem_seg_val``, in ADE20K's layout."""
    root = default_root() / "ade"
    classes = ClassList(names=(*THING_CLASSES, *STUFF_CLASSES), first_label=1)
    for split, folder in ADE_NAMES.items():
        name = f"shapes_sem_seg_{split}"
        images, labels = root / "images" / folder, root / "annotations" / folder
        register_sem_seg(name, images, labels, classes, colors=COLORS)


def register_ade20k_sem_seg() -> None:
    """Replace Detectron2's ``ade20k_sem_seg_{train,val}`` by ones whose labels are checked.

    The labels are read from ``annotations_detectron2``.
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / "ADEChallengeData2016"
    for split, folder in ADE_NAMES.items():
        name = f"ade20k_sem_seg_{split}"
        classes = ClassList(names=tuple(MetadataCatalog.get(name).stuff_classes))
        images, labels = root / "images" / folder, root / "annotations_detectron2" / folder
        register_sem_seg(name, images, labels, classes, colors=ADE20K_COLORS)
