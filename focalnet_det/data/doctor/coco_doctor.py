"""Diagnose a COCO file and its images, and repair what is safe."""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hotcoco

from ...atomic import write_text
from ..io.box_format import XYXY
from ..io.coco_files import CocoFile, read_coco
from ..io.coco_objects import is_box
from ..io.issues import DataError
from ..io.json_files import read_json_lists
from ..io.masks import valid_part
from ..issue_policies import CROWD, ISSUE_POLICIES
from .findings import Finding, findings_from_errors
from .image_checks import (
    ImageSummary,
    conversion_notes,
    duplicate_findings,
    read_summaries,
    size_mismatches,
    unusual_size_notes,
)

# Codes of hotcoco's health check that `read_coco` does not cover -> (problem, remedy).
HOTCOCO_NOTES = {
    "extreme_aspect_ratio": (
        "objects with an aspect ratio above 20",
        "Review them: boxes only a few pixels wide are hard to learn.",
    ),
    "bbox_out_of_bounds": (
        "boxes that extend beyond their image",
        "They are clipped to the image in training.",
    ),
    "zero_instance_category": (
        "classes without objects",
        "They cannot be learned or evaluated. Add images, or remove the classes.",
    ),
    "low_instance_category": (
        "classes with fewer than 10 objects",
        "They are hard to learn, and their AP is unreliable. Add images.",
    ),
}


def verify_coco(
    json_file: Path, images: Path, val_json: Path | None = None, val_images: Path | None = None
) -> list[Finding]:
    """Check a COCO file of instances or keypoints and its images, optionally with a second split.

    Args:
        json_file: annotation file.
        images: image folder.
        val_json, val_images: those of the validation split; None for none.
    Returns: findings, none if the data is valid.
    Raises: FileNotFoundError if a file is missing, DataError if it is not in COCO format.
    """
    train_file, findings = check_file(json_file, images)
    train_summaries, image_findings = inspect_images(train_file, images)
    findings += image_findings
    val_summaries: list[ImageSummary] = []
    if val_json is not None and val_images is not None:
        val_file, file_findings = check_file(val_json, val_images)
        val_summaries, image_findings = inspect_images(val_file, val_images)
        findings += file_findings + image_findings
        if train_file is not None and val_file is not None:
            findings += compare_classes(train_file, val_file)
    return [*findings, *duplicate_findings(train_summaries, val_summaries)]


def check_file(json_file: Path, images: Path) -> tuple[CocoFile | None, list[Finding]]:
    """Read a COCO file as for training; return it, or None if it is unusable, and findings."""
    try:
        file = read_coco(json_file, images, evaluation=True)
    except DataError as error:
        if error.errors is None:
            raise
        return None, list(findings_from_errors(error.errors))
    notes = [
        Finding(
            problem=f"{json_file}: {problem}",
            remedy=ISSUE_POLICIES[problem].explanation,
            examples=(),
            count=file.issues[problem],
            fatal=False,
        )
        for problem in ISSUE_POLICIES
        if file.issues[problem] and problem != CROWD
    ]
    return file, [*notes, *hotcoco_notes(file)]


def hotcoco_notes(file: CocoFile) -> Iterator[Finding]:
    """Yield notes of hotcoco's health check on what ``read_coco`` does not report."""
    content = {
        "images": list(file.images.values()),
        "annotations": file.annotations,
        "categories": file.categories,
    }
    warnings = hotcoco.COCO(content).healthcheck()["warnings"]
    names = {category["id"]: str(category["name"]) for category in file.categories}
    for warning in warnings:
        if warning["code"] in HOTCOCO_NOTES:
            problem, remedy = HOTCOCO_NOTES[warning["code"]]
            concerns_classes = warning["code"].endswith("category")
            ids = sorted(warning["affected_ids"])
            yield Finding(
                problem=f"{file.path}: {problem}",
                remedy=remedy,
                examples=tuple(names[k] if concerns_classes else f"annotation {k}" for k in ids),
                fatal=False,
            )


def inspect_images(file: CocoFile | None, images: Path) -> tuple[list[ImageSummary], list[Finding]]:
    """Open all images of a file, and check their sizes; none if the file could not be read."""
    if file is None:
        return [], []
    listed_sizes = {
        os.path.join(images, image["file_name"]): (image.get("height"), image.get("width"))
        for image in file.images.values()
    }
    summaries, findings = read_summaries(list(listed_sizes))
    notes = [*conversion_notes(summaries), *unusual_size_notes(summaries)]
    return summaries, [*findings, *size_mismatches(summaries, listed_sizes), *notes]


def compare_classes(first: CocoFile, second: CocoFile) -> Iterator[Finding]:
    """Yield findings on class lists that differ, and on classes that one split lacks."""
    names = [[(c["id"], c["name"]) for c in file.categories] for file in (first, second)]
    if names[0] != names[1]:
        different = sorted({str(name) for _, name in set(names[0]) ^ set(names[1])})
        yield Finding(
            problem=f"{first.path} and {second.path} have different categories",
            remedy="Use the same ids and names in both.",
            examples=tuple(different),
        )
        return
    used = [Counter(r["category_id"] for r in f.annotations if not r.get("iscrowd"))
            for f in (first, second)]  # fmt: skip
    for here, there, file in ((used[0], used[1], second), (used[1], used[0], first)):
        if missing := [str(name) for key, name in names[0] if here[key] and not there[key]]:
            yield Finding(
                problem=f"classes of the other split without objects in {file.path}",
                remedy="They cannot be learned or evaluated. Split the images differently.",
                examples=tuple(missing),
                fatal=False,
            )


def fix_coco(json_file: Path, images: Path, target: Path) -> list[str]:
    """Write a copy of a COCO file with safe repairs.

    Boxes are converted from [left, top, right, bottom] to [x, y, width, height] if the whole file
    uses the former; ids, sizes, boxes and areas are repaired as in training; annotations of
    unlisted images or without a valid box or mask are removed.

    Args:
        json_file: annotation file, left unchanged.
        images: image folder.
        target: file to write.
    Returns: the repairs, one sentence each; nothing is written if there are none.
    Raises: ValueError if ``target`` is the file itself; DataError with the remaining errors.
    """
    if target.resolve() == json_file.resolve():
        raise ValueError(f"--fix writes a copy. Choose another file than {json_file}.")
    content = read_json_lists(json_file, ("images", "annotations", "categories"), "COCO")
    repairs = []
    try:
        file = read_coco(json_file, images)
    except DataError as error:
        if error.errors is None or set(error.errors.counts) != {XYXY}:
            raise
        content = copy.deepcopy(content)
        count = convert_xyxy_boxes(content["annotations"])
        repairs.append(f"{count} boxes converted from corners to [x, y, width, height].")
        write_text(target, json.dumps(content))
        file = read_coco(target, images)
    repairs += [f"{count} x {problem}." for problem, count in file.settled.items()]
    rows = [row for row in file.annotations if not is_dropped(row, file)]
    if removed := len(file.annotations) - len(rows):
        repairs.append(f"{removed} annotations without a valid box or mask removed.")
    if repairs:
        fixed = {**content, "images": list(file.images.values()), "annotations": rows}
        write_text(target, json.dumps(fixed, allow_nan=False))
    return repairs


def convert_xyxy_boxes(annotations: Sequence[dict[str, Any]]) -> int:
    """Convert boxes from xyxy to xywh in place, and return their number."""
    for row in annotations:
        left, top, right, bottom = row["bbox"]
        row["bbox"] = [left, top, right - left, bottom - top]
        row["area"] = row["bbox"][2] * row["bbox"][3] if not row.get("segmentation") else None
    return len(annotations)


def is_dropped(row: Mapping[str, Any], file: CocoFile) -> bool:
    """Return whether training drops an annotation because of its box or mask."""
    image = file.images[row["image_id"]]
    size = (image["height"], image["width"]) if "height" in image else None
    mask = row.get("segmentation")
    return not is_box(row.get("bbox")) or (bool(mask) and valid_part(mask, size) is None)
