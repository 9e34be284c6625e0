"""Check that panoptic PNGs exist, and that a sample agrees with the JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..issue_policies import LABEL_SIZE_DIFFERS, UNREADABLE_LABELS, VOID_SEGMENT, report_issues
from ..panoptic.segments import read_segment_ids, segment_pixels
from .image_files import MISSING, evenly_spaced, missing_files, suggest_file
from .issues import SHOWN, ValidationErrors
from .labels import UnreadableLabelsError
from .open_image import upright_size

PNG_REMEDIES = {
    MISSING: "Check the folder of PNGs, and file_name of annotations.",
    UNREADABLE_LABELS: "Segment ids are colors of an RGB PNG: R + 256 G + 65536 B.",
    LABEL_SIZE_DIFFERS: "Resize with nearest-neighbor interpolation, or use the matching file.",
    "segments without pixels": "Remove them from the JSON, or draw them in the PNG.",
    VOID_SEGMENT: "List the segment, or set these pixels to 0 (void).",
}
# PNGs to decode. Evaluation decodes more, because a single disagreement would stop it later.
TRAINING_SAMPLE = 32
EVALUATION_SAMPLE = 300


def check_segment_files(
    subject: object, records: Sequence[Mapping[str, Any]], *, evaluation: bool
) -> None:
    """Check that all PNGs exist, and compare a sample with their lists of segments.

    Args:
        subject: dataset or JSON that messages begin with.
        records: with "pan_seg_file_name", "segments_info" and "file_name".
        evaluation: treat every disagreement as an error, not only those of a majority.
    Raises: DataError with all errors.
    """
    errors = ValidationErrors(f"The PNGs of {subject}", PNG_REMEDIES)
    paths = [str(record["pan_seg_file_name"]) for record in records]
    for number, path in enumerate(missing_files(paths)):
        errors.add(MISSING, suggest_file(path) if number < SHOWN else path)
    errors.raise_if_any()
    sample = evenly_spaced(len(records), EVALUATION_SAMPLE if evaluation else TRAINING_SAMPLE)
    problems = [problem for index in sample for problem in _problems(records[index])]
    counts = Counter(kind for kind, _ in problems)
    for kind, detail in problems:
        if evaluation or 2 * counts[kind] > len(sample):
            errors.add(kind, detail)
    errors.raise_if_any()
    report_issues(f"{subject}, a sample of its PNGs", counts, evaluation=evaluation)


def _problems(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (problem, detail) for the PNG of a record, at most one of each kind."""
    path = str(record["pan_seg_file_name"])
    try:
        ids = read_segment_ids(path)
    except UnreadableLabelsError as error:
        return [(UNREADABLE_LABELS, str(error))]
    problems = []
    try:
        size = upright_size(record["file_name"])
    except Exception:  # reported by the check of the images
        size = (ids.shape[0], ids.shape[1])
    if ids.shape != size:
        detail = f"{path} is {ids.shape[1]} x {ids.shape[0]}, the image is {size[1]} x {size[0]}"
        problems.append((LABEL_SIZE_DIFFERS, detail))
    pixels, listed = segment_pixels(ids), {s["id"] for s in record["segments_info"]}
    if empty := sorted(listed - pixels.keys()):
        problems.append(("segments without pixels", f"{path}: id {empty[0]}"))
    if unlisted := sorted(pixels.keys() - listed):
        count = int(np.sum([pixels[key] for key in unlisted]))
        problems.append((VOID_SEGMENT, f"{path}: id {unlisted[0]} and others, {count} pixels"))
    return problems
