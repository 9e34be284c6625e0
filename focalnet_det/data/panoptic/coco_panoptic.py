"""Convert panoptic PNGs to the semantic labels of Panoptic FPN and Mask2Former."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..io.write_image import run_jobs, write_png
from .panoptic_sets import PanopticClasses, separated_classes, unified_classes
from .segments import Record, SegmentLabels, read_panoptic_json, read_segment_ids

# Prefix of the label folder -> class layout of its labels.
LABEL_LAYOUTS: dict[str, Callable[[Sequence[Record]], PanopticClasses]] = {
    "panoptic_stuff": separated_classes,
    "panoptic_semseg": unified_classes,
}
SPLITS = ("train2017", "val2017")

# Panoptic PNG; segment id -> category; category -> class, for each file to write; files to write.
Job = tuple[Path, Mapping[int, int], tuple[Mapping[int, int], ...], tuple[Path, ...]]


def prepare_coco_panoptic(
    root: Path, *, forms: Sequence[str], splits: Sequence[str], workers: int
) -> int:
    """Write ``panoptic_stuff_*`` and ``panoptic_semseg_*`` beside ``panoptic_*``.

    "panoptic_stuff" maps all things to 0, followed by the stuff classes (54 in total for COCO);
    "panoptic_semseg" has all classes (133 for COCO). 255 is unlabeled. Files are written
    atomically, and existing ones are skipped, so that an interrupted run can be resumed.

    Args:
        root: folder of ``annotations/panoptic_*.json`` and ``panoptic_*``.
        forms: keys of ``LABEL_LAYOUTS``.
        splits: "train2017", "val2017".
        workers: number of processes.
    Returns: number of files written.
    Raises: ValueError if JSON and PNG disagree, FileNotFoundError if a file is missing.
    """
    jobs: list[Job] = []
    for split in splits:
        file = read_panoptic_json(root / f"annotations/panoptic_{split}.json")
        categories = list(file.categories.values())
        tables = {}
        for form in forms:
            classes = LABEL_LAYOUTS[form](categories)
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
    """Write the label files of one image, and return their number.

    Raises: ValueError if a segment has an unknown category.
    """
    source, segments, tables, targets = job
    ids = read_segment_ids(source)
    for table, target in zip(tables, targets, strict=True):
        if unknown := [category for category in segments.values() if category not in table]:
            raise ValueError(
                f"{source} has a segment of category {unknown[0]}, which the JSON does not list."
            )
        labels = SegmentLabels({k: table[category] for k, category in segments.items()}).map_ids(
            ids
        )
        write_png(target, labels)
    return len(targets)
