"""Whether the PNGs of panoptic segments are there, and a sample agrees with the JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..issue_policies import LABEL_SIZE_DIFFERS, UNREADABLE_LABELS, VOID_SEGMENT, report_issues
from ..panoptic.segments import read_segment_ids, segment_pixels
from .image_files import MISSING, evenly, hint, missing_files
from .issues import SHOWN, Faults
from .labels import UnreadableLabelsError
from .open_image import upright_size

PNG_REMEDIES = {
    MISSING: "Check the folder of PNGs, and file_name of annotations.",
    UNREADABLE_LABELS: "Segments are colors of an RGB PNG: R + 256 G + 65536 B.",
    LABEL_SIZE_DIFFERS: "Resize with nearest-neighbor interpolation, or find the right one.",
    "segments without pixels": "Remove them from the JSON, or draw them in the PNG.",
    VOID_SEGMENT: "List the segment, or make these pixels 0 (void).",
}
# PNGs that are decoded; those of an evaluation stop it, so that more are.
TRAINING_SAMPLE = 32
EVALUATION_SAMPLE = 300


def check_segment_files(
    subject: object, records: Sequence[Mapping[str, Any]], *, evaluation: bool
) -> None:
    """Check that all PNGs are there, and compare a sample with the lists of segments.

    Args:
        subject: JSON that names them.
        records: with "pan_seg_file_name", "segments_info" and "file_name".
        evaluation: any disagreement is a fault, and not only one of most PNGs.
    Raises: DataError with all faults.
    """
    faults = Faults(f"The PNGs of {subject}", PNG_REMEDIES)
    paths = [str(record["pan_seg_file_name"]) for record in records]
    for number, path in enumerate(missing_files(paths)):
        faults.add(MISSING, hint(path) if number < SHOWN else path)
    faults.stop()
    sample = evenly(len(records), EVALUATION_SAMPLE if evaluation else TRAINING_SAMPLE)
    found = [problem for index in sample for problem in _problems(records[index])]
    counts = Counter(kind for kind, _ in found)
    for kind, detail in found:
        if evaluation or 2 * counts[kind] > len(sample):
            faults.add(kind, detail)
    faults.stop()
    report_issues(f"{subject}, a sample of its PNGs", counts, evaluation=evaluation)


def _problems(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (problem, detail), one of each kind at most, for the PNG of a record."""
    path = str(record["pan_seg_file_name"])
    try:
        ids = read_segment_ids(path)
    except UnreadableLabelsError as error:
        return [(UNREADABLE_LABELS, str(error))]
    found = []
    try:
        size = upright_size(record["file_name"])
    except Exception:  # the check of the images tells
        size = (ids.shape[0], ids.shape[1])
    if ids.shape != size:
        detail = f"{path} is {ids.shape[1]} x {ids.shape[0]}, the image {size[1]} x {size[0]}"
        found.append((LABEL_SIZE_DIFFERS, detail))
    pixels, listed = segment_pixels(ids), {s["id"] for s in record["segments_info"]}
    if empty := sorted(listed - pixels.keys()):
        found.append(("segments without pixels", f"{path}: id {empty[0]}"))
    if unlisted := sorted(pixels.keys() - listed):
        count = int(np.sum([pixels[key] for key in unlisted]))
        found.append((VOID_SEGMENT, f"{path}: id {unlisted[0]} and others, {count} pixels"))
    return found
