"""What is wrong with folders of images and label maps, and with panoptic sets."""

from collections.abc import Sequence
from pathlib import Path

from ..io.json_files import read_json_lists
from ..io.panoptic_rows import PANOPTIC_LISTS
from ..semantic.label_folders import ClassList, files_by_stem
from .findings import Finding, verify_sem_seg
from .image_checks import Picture, odd_pictures, odd_sizes, open_all, repeated
from .panoptic_doctor import verify_panoptic


def verify_folders(
    images: str | Path,
    labels: str | Path,
    classes: ClassList,
    val_images: str | Path | None = None,
) -> list[Finding]:
    """Check folders of images and label maps, and look for images that occur twice.

    Args:
        val_images: folder of validation images; images that are in both are an error.
    Returns: findings, none if all is well.
    Raises: FileNotFoundError if a folder is missing, ValueError if file names are ambiguous.
    """
    pictures = [str(path) for path in files_by_stem(images, None).values()]
    return [*verify_sem_seg(images, labels, classes), *notes_on_pictures(pictures, val_images)]


def verify_panoptic_set(
    panoptic_json: Path, root: Path, images: Path, val_images: str | Path | None = None
) -> list[Finding]:
    """Check a panoptic JSON, its PNGs and its images, and look for images that occur twice.

    Args:
        val_images: as above.
    Returns: findings, none if all is well.
    Raises: FileNotFoundError if a file is missing, ValueError if the JSON is not in COCO's panoptic
        format.
    """
    findings = verify_panoptic(panoptic_json, root, images)
    rows = read_json_lists(panoptic_json, PANOPTIC_LISTS, "COCO panoptic")["images"]
    names = [row["file_name"] for row in rows if isinstance(row.get("file_name"), str)]
    return [*findings, *notes_on_pictures([str(images / name) for name in names], val_images)]


def notes_on_pictures(paths: Sequence[str], val_images: str | Path | None) -> list[Finding]:
    """Return notes on odd pictures, and findings of those that occur twice.

    Args:
        val_images: folder of validation images; None for none.
    """
    pictures, _ = open_all(paths)
    held_out: list[Picture] = []
    found: list[Finding] = []
    if val_images is not None:
        held_out, found = open_all([str(p) for p in files_by_stem(val_images, None).values()])
    notes = [*odd_pictures(pictures), *odd_sizes(pictures)]
    return [*notes, *found, *repeated(pictures, held_out)]
