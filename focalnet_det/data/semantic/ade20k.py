"""Convert ADE20K's scene parsing labels to the layout that Detectron2 reads."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..instances.mappers import size_mismatch_message
from ..io.labels import LabelRule, read_values
from ..io.open_image import open_header
from ..io.write_image import run_jobs, write_png
from .label_folders import paired_files

RULE = LabelRule(num_classes=150, first_label=1)
# Images in each folder of the published archive.
COUNTS = {"training": 20_210, "validation": 2_000}
LABELS = "annotations_detectron2"


def default_ade20k_root() -> Path:
    """Return ``$DETECTRON2_DATASETS/ADEChallengeData2016``; the variable defaults to datasets."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / "ADEChallengeData2016"


def prepare_ade20k_sem_seg(root: Path, *, workers: int, partial: bool = False) -> int:
    """Write ``annotations_detectron2``: classes 0..149, 255 for unlabeled pixels.

    Files are written atomically, and existing ones are skipped, so that an interrupted run can be
    resumed.

    Args:
        root: folder of the published ``images`` and ``annotations``.
        workers: number of processes.
        partial: accept a subset of the published images.
    Returns: number of files written.
    Raises: ValueError if image counts, sizes or labels differ from the published ones,
        FileNotFoundError if a folder is missing.
    """
    jobs = []
    for split, expected in COUNTS.items():
        pairs = paired_files(root / "images" / split, root / "annotations" / split)
        if len(pairs) != expected and not partial:
            raise ValueError(
                f"{root} has {len(pairs)} images with labels in {split} instead of the published "
                f"{expected}. Unpack the archive again, or use --partial for a subset."
            )
        folder = root / LABELS / split
        folder.mkdir(parents=True, exist_ok=True)
        jobs += [(image, labels, folder / f"{labels.stem}.png") for image, labels in pairs]
    missing = [job for job in jobs if not job[2].exists()]
    return sum(run_jobs(convert, missing, workers))


def convert(job: tuple[Path, Path, Path]) -> int:
    """Convert one label file; the job is (image, labels, target). Return 1, the number of files.

    Raises: ValueError if the sizes differ or a label is not in 0..150.
    """
    image, path, target = job
    values: Any = read_values(path)
    with open_header(image) as header:
        size = (header.height, header.width)
    if values.shape != size:
        raise ValueError(size_mismatch_message(path, values.shape, size))
    labels = RULE.classes(values, path).astype(np.uint8)
    write_png(target, labels)
    return 1
