"""Semantic labels from panoptic PNGs, as panoptic FPN and Mask2Former want them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..io.write_image import run_jobs, write_picture
from .panoptic_sets import PanopticClasses, separated_classes, unified_classes
from .segments import Record, SegmentLabels, read_panoptic_json, read_segment_ids

# Folder's prefix: the numbering of its labels.
FORMS: dict[str, Callable[[Sequence[Record]], PanopticClasses]] = {
    "panoptic_stuff": separated_classes,
    "panoptic_semseg": unified_classes,
}
SPLITS = ("train2017", "val2017")

# PNG of segments; segment id -> category; category -> class of each form; files to write.
Job = tuple[Path, Mapping[int, int], tuple[Mapping[int, int], ...], tuple[Path, ...]]


def prepare_coco_panoptic(
    root: Path, *, forms: Sequence[str], splits: Sequence[str], workers: int
) -> int:
    """Writes ``panoptic_stuff_*`` and ``panoptic_semseg_*`` beside ``panoptic_*``.

    "panoptic_stuff": 0 for all things, then the stuff classes, 54 for COCO. "panoptic_semseg": all
    classes, 133 for COCO. 255 for what has no label. Files that are there are kept; each is whole
    or absent, so an interrupted run is continued by the next.

    Args:
        root: with ``annotations/panoptic_*.json`` and ``panoptic_*``.
        forms: of ``FORMS``.
        splits: "train2017", "val2017".
        workers: processes.
    Returns: files written.
    Raises: ValueError if JSON and PNG disagree, FileNotFoundError if a file is missing.
    """
    jobs: list[Job] = []
    for split in splits:
        file = read_panoptic_json(root / f"annotations/panoptic_{split}.json")
        categories = list(file.categories.values())
        tables = {}
        for form in forms:
            classes = FORMS[form](categories)
            tables[form] = {k: classes.semantic_class(k) for k in file.categories}
        for annotation in file.annotations.values():
            name = annotation["file_name"]
            targets = {form: root / f"{form}_{split}" / name for form in forms}
            missing = [form for form, path in targets.items() if not path.exists()]
            segments = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
            if missing:
                source = root / f"panoptic_{split}" / name
                chosen = tuple(tables[form] for form in missing)
                jobs.append((source, segments, chosen, tuple(targets[form] for form in missing)))
    return sum(run_jobs(convert, jobs, workers))


def convert(job: Job) -> int:
    """Writes the label files of one image, returns their number.

    Raises: ValueError if a segment is of no category.
    """
    source, segments, tables, targets = job
    ids = read_segment_ids(source)
    for table, target in zip(tables, targets, strict=True):
        if unknown := [category for category in segments.values() if category not in table]:
            raise ValueError(
                f"{source} has a segment of category {unknown[0]}, which is not listed."
            )
        labels = SegmentLabels({k: table[category] for k, category in segments.items()}).of(ids)
        write_picture(target, labels)
    return len(targets)
