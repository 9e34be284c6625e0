"""Diagnose label folders and panoptic datasets, including duplicate images."""

from collections.abc import Sequence
from pathlib import Path

from ..io.json_files import read_json_lists
from ..io.panoptic_rows import PANOPTIC_LISTS
from ..semantic.label_folders import ClassList, files_by_stem
from .findings import Finding, verify_sem_seg
from .image_checks import (
    ImageSummary,
    conversion_notes,
    duplicate_findings,
    read_summaries,
    unusual_size_notes,
)
from .panoptic_doctor import verify_panoptic


def verify_folders(
    images: str | Path,
    labels: str | Path,
    classes: ClassList,
    val_images: str | Path | None = None,
) -> list[Finding]:
    """Check folders of images and label maps, and search for duplicate images.

    Args:
        images: image folder.
        labels: folder of label files.
        classes: class list of the label values.
        val_images: folder of validation images; images in both folders are an error.
    Returns: findings, none if the data is valid.
    Raises: FileNotFoundError if a folder is missing, ValueError if file names are ambiguous.
    """
    paths = [str(path) for path in files_by_stem(images, None).values()]
    return [*verify_sem_seg(images, labels, classes), *image_notes(paths, val_images)]


def verify_panoptic_set(
    panoptic_json: Path, root: Path, images: Path, val_images: str | Path | None = None
) -> list[Finding]:
    """Check a panoptic JSON, its PNGs and its images, and search for duplicate images.

    Args:
        panoptic_json: annotation file.
        root: folder of the PNGs.
        images: image folder.
        val_images: folder of validation images; images in both folders are an error.
    Returns: findings, none if the data is valid.
    Raises: FileNotFoundError if a file is missing, ValueError if the JSON is not in COCO's panoptic
        format.
    """
    findings = verify_panoptic(panoptic_json, root, images)
    rows = read_json_lists(panoptic_json, PANOPTIC_LISTS, "COCO panoptic")["images"]
    names = [row["file_name"] for row in rows if isinstance(row.get("file_name"), str)]
    return [*findings, *image_notes([str(images / name) for name in names], val_images)]


def image_notes(paths: Sequence[str], val_images: str | Path | None) -> list[Finding]:
    """Return notes on unusual images, and findings on duplicates.

    Args:
        paths: images.
        val_images: folder of validation images; None for none.
    """
    train_summaries, _ = read_summaries(paths)
    val_summaries: list[ImageSummary] = []
    findings: list[Finding] = []
    if val_images is not None:
        val_paths = [str(path) for path in files_by_stem(val_images, None).values()]
        val_summaries, findings = read_summaries(val_paths)
    notes = [*conversion_notes(train_summaries), *unusual_size_notes(train_summaries)]
    return [*notes, *findings, *duplicate_findings(train_summaries, val_summaries)]
