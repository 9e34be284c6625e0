"""Checks of registered data sets before the first step of a run."""

from pathlib import Path
from typing import Any

from .io.label_files import check_label_files
from .io.labels import LabelRule
from .io.panoptic_files import check_segment_files
from .loader import check_masks, dataset_records
from .registry import check_images


def check_dataset(name: str, *, evaluation: bool, masks: bool = False) -> int:
    """Read a registered data set, and check that its files are there and a sample is sound.

    Sets that ``register_coco_json``, ``register_panoptic_json`` or ``register_label_folders``
    registered have been checked then; this is for those that configs name.

    Args:
        evaluation: hold it to what an evaluation needs.
        masks: objects need masks: that of a mask detector.
    Returns: number of images.
    Raises: FileNotFoundError if a file of annotations is missing, ValueError with all faults.
    """
    records = dataset_records([name], filter_empty=False)
    if masks:
        check_masks(name, records, evaluation=evaluation)
    check_images(name, records, evaluation=evaluation)
    first = records[0]
    if "pan_seg_file_name" in first:
        check_segment_files(name, records, evaluation=evaluation)
    elif "sem_seg_file_name" in first:
        _check_labels(name, records, evaluation=evaluation)
    return len(records)


def _check_labels(name: str, records: list[dict[str, Any]], *, evaluation: bool) -> None:
    rule = records[0].get("label_rule")
    if not isinstance(rule, LabelRule) or rule.num_classes is None:
        return
    check_label_files(
        name,
        [(Path(r["file_name"]), Path(r["sem_seg_file_name"])) for r in records],
        num_classes=rule.num_classes,
        first_label=rule.first_label,
        evaluation=evaluation,
    )
