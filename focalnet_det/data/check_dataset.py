"""Check registered datasets before the first iteration of a run."""

from pathlib import Path
from typing import Any

from .io.label_files import check_label_files
from .io.labels import LabelRule
from .io.panoptic_files import check_segment_files
from .loader import check_masks, dataset_records
from .registry import check_images


def check_dataset(name: str, *, evaluation: bool, masks: bool = False) -> int:
    """Load a registered dataset, and check that its files exist and a sample of them is valid.

    ``register_coco_json``, ``register_panoptic_json`` and ``register_label_folders`` check on
    registration; this function is for datasets that a config refers to by name.

    Args:
        name: name in Detectron2's catalog.
        evaluation: apply the stricter rules of evaluation.
        masks: require instance masks.
    Returns: number of images.
    Raises: FileNotFoundError if an annotation file is missing, ValueError with all errors.
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
