"""What is wrong with folders of images and label maps, and how to mend it."""

from pathlib import Path

from ..semantic import ClassList, files_by_stem
from ..verify import Finding, verify_sem_seg
from .pictures import Picture, odd_pictures, open_all, repeated


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
    findings = verify_sem_seg(images, labels, classes)
    pictures, _ = open_all([str(path) for path in files_by_stem(images, None).values()])
    findings += odd_pictures(pictures)
    held_out: list[Picture] = []
    found: list[Finding] = []
    if val_images is not None:
        held_out, found = open_all([str(p) for p in files_by_stem(val_images, None).values()])
    return [*findings, *found, *repeated(pictures, held_out)]
