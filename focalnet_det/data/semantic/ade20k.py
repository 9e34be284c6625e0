"""ADE20K's scene parsing labels in the form that Detectron2 reads."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..instances.mappers import size_message
from ..io.labels import LabelRule, read_values
from ..io.open_image import open_header
from ..io.write_image import run_jobs, write_picture
from .label_folders import paired_files

RULE = LabelRule(num_classes=150, first_label=1)
# Pairs of image and label in each folder of the published archive.
COUNTS = {"training": 20_210, "validation": 2_000}
LABELS = "annotations_detectron2"


def default_ade20k_root() -> Path:
    """``$DETECTRON2_DATASETS/ADEChallengeData2016``, below ``datasets`` where that is not set."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / "ADEChallengeData2016"


def prepare_ade20k_sem_seg(root: Path, *, workers: int, partial: bool = False) -> int:
    """Writes ``annotations_detectron2``: classes 0..149, 255 for what has none.

    Files that are there are kept; each is whole or absent, so an interrupted run is continued by
    the next.

    Args:
        root: with ``images`` and ``annotations`` as in the published archive.
        workers: processes.
        partial: accept other numbers of images than the published ones.
    Returns: files written.
    Raises: ValueError if numbers, sizes or labels are not as published, FileNotFoundError if a
        folder is missing.
    """
    jobs = []
    for split, expected in COUNTS.items():
        pairs = paired_files(root / "images" / split, root / "annotations" / split)
        if len(pairs) != expected and not partial:
            raise ValueError(
                f"{root} has {len(pairs)} pairs of image and label in {split}, the published set "
                f"{expected}: unpack the archive again, or use --partial for a part of it."
            )
        folder = root / LABELS / split
        folder.mkdir(parents=True, exist_ok=True)
        jobs += [(image, labels, folder / f"{labels.stem}.png") for image, labels in pairs]
    missing = [job for job in jobs if not job[2].exists()]
    return sum(run_jobs(convert, missing, workers))


def convert(job: tuple[Path, Path, Path]) -> int:
    """Checks and writes one label file; (image, labels, target), returns 1.

    Raises: ValueError if the sizes differ or a label is not 0..150.
    """
    image, path, target = job
    values: Any = read_values(path)
    with open_header(image) as picture:
        size = (picture.height, picture.width)
    if values.shape != size:
        raise ValueError(size_message(path, values.shape, size))
    labels = RULE.classes(values, path).astype(np.uint8)
    write_picture(target, labels)
    return 1
