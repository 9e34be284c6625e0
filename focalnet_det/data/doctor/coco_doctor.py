"""What is wrong with a COCO file and its images, and how to mend it."""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hotcoco

from ...atomic import write_text
from ..io.coco_files import CocoFile, read_coco
from ..io.coco_objects import is_box
from ..io.coco_suspicions import XYXY
from ..io.issues import DataError
from ..io.json_files import read_json_lists
from ..io.masks import sound_mask
from ..issue_policies import CROWD, ISSUE_POLICIES
from .findings import Finding, findings_of_faults
from .image_checks import Picture, odd_pictures, odd_sizes, open_all, repeated, wrong_sizes

# Code of hotcoco's health check, where it knows more than the reader: problem and remedy.
HEALTH = {
    "extreme_aspect_ratio": (
        "objects more than 20 times as long as wide",
        "Look at them: boxes of a few pixels' width are hard to learn.",
    ),
    "bbox_out_of_bounds": (
        "boxes that reach out of their image",
        "They are clipped to the image in training.",
    ),
    "zero_instance_category": (
        "classes without an object",
        "They cannot be learned or measured: add images, or remove them.",
    ),
    "low_instance_category": (
        "classes with fewer than 10 objects",
        "They are hard to learn, and their AP says little: add images.",
    ),
}


def verify_coco(
    json_file: Path, images: Path, val_json: Path | None = None, val_images: Path | None = None
) -> list[Finding]:
    """Check a COCO file of instances or keypoints, and its images; with a second one, both.

    Returns: findings, none if all is well.
    Raises: FileNotFoundError if a file is missing, DataError if it is not in COCO format.
    """
    first, findings = check_file(json_file, images)
    pictures, found = check_pictures(first, images)
    findings += found
    held_out: list[Picture] = []
    if val_json is not None and val_images is not None:
        second, found = check_file(val_json, val_images)
        held_out, more = check_pictures(second, val_images)
        findings += found + more
        if first is not None and second is not None:
            findings += compare_classes(first, second)
    return [*findings, *repeated(pictures, held_out)]


def check_file(json_file: Path, images: Path) -> tuple[CocoFile | None, list[Finding]]:
    """Return what the reader of trainings makes of a file, None if nothing, and findings."""
    try:
        file = read_coco(json_file, images, evaluation=True)
    except DataError as error:
        if error.faults is None:
            raise
        return None, list(findings_of_faults(error.faults))
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
    return file, [*notes, *health(file)]


def health(file: CocoFile) -> Iterator[Finding]:
    """Yield notes of hotcoco's health check that the reader does not have."""
    content = {
        "images": list(file.images.values()),
        "annotations": file.annotations,
        "categories": file.categories,
    }
    warnings = hotcoco.COCO(content).healthcheck()["warnings"]
    names = {category["id"]: str(category["name"]) for category in file.categories}
    for warning in warnings:
        if warning["code"] in HEALTH:
            problem, remedy = HEALTH[warning["code"]]
            of_classes = warning["code"].endswith("category")
            ids = sorted(warning["affected_ids"])
            yield Finding(
                problem=f"{file.path}: {problem}",
                remedy=remedy,
                examples=tuple(names[k] if of_classes else f"annotation {k}" for k in ids),
                fatal=False,
            )


def check_pictures(file: CocoFile | None, images: Path) -> tuple[list[Picture], list[Finding]]:
    """Open all images of a file; none if it could not be read."""
    if file is None:
        return [], []
    said = {
        os.path.join(images, image["file_name"]): (image.get("height"), image.get("width"))
        for image in file.images.values()
    }
    pictures, findings = open_all(list(said))
    notes = [*odd_pictures(pictures), *odd_sizes(pictures)]
    return pictures, [*findings, *wrong_sizes(pictures, said), *notes]


def compare_classes(first: CocoFile, second: CocoFile) -> Iterator[Finding]:
    """Yield findings of class lists that differ, and of classes that one split lacks."""
    names = [[(c["id"], c["name"]) for c in file.categories] for file in (first, second)]
    if names[0] != names[1]:
        different = sorted({str(name) for _, name in set(names[0]) ^ set(names[1])})
        yield Finding(
            problem=f"{first.path} and {second.path} have other categories",
            remedy="Both need the same ids and names.",
            examples=tuple(different),
        )
        return
    used = [Counter(r["category_id"] for r in f.annotations if not r.get("iscrowd"))
            for f in (first, second)]  # fmt: skip
    for here, there, file in ((used[0], used[1], second), (used[1], used[0], first)):
        if missing := [str(name) for key, name in names[0] if here[key] and not there[key]]:
            yield Finding(
                problem=f"classes of the other split without an object in {file.path}",
                remedy="They cannot be measured, or not learned: split the images anew.",
                examples=tuple(missing),
                fatal=False,
            )


def fix_coco(json_file: Path, images: Path, target: Path) -> list[str]:
    """Write a copy of a COCO file with the repairs that are safe.

    Boxes of [left, top, right, bottom] become [x, y, width, height] where the whole file has them;
    ids, sizes, boxes and areas are repaired as a training would; annotations of unlisted images and
    without a sound box or mask are left out.

    Returns: what was done, a sentence each; nothing is written if it is nothing.
    Raises: ValueError if the target is the file itself; DataError with the faults that are left.
    """
    if target.resolve() == json_file.resolve():
        raise ValueError(f"--fix writes a copy: name another file than {json_file}.")
    content = read_json_lists(json_file, ("images", "annotations", "categories"), "COCO")
    done = []
    try:
        file = read_coco(json_file, images)
    except DataError as error:
        if error.faults is None or set(error.faults.counts) != {XYXY}:
            raise
        content = copy.deepcopy(content)
        done.append(f"{from_corners(content['annotations'])} boxes given as corners.")
        write_text(target, json.dumps(content))
        file = read_coco(target, images)
    done += [f"{count} x {problem}." for problem, count in file.settled.items()]
    rows = [row for row in file.annotations if not is_dropped(row, file)]
    if left_out := len(file.annotations) - len(rows):
        done.append(f"{left_out} annotations without a sound box or mask left out.")
    if done:
        fixed = {**content, "images": list(file.images.values()), "annotations": rows}
        write_text(target, json.dumps(fixed, allow_nan=False))
    return done


def from_corners(annotations: Sequence[dict[str, Any]]) -> int:
    """Change boxes from xyxy to xywh, in place; return how many."""
    for row in annotations:
        left, top, right, bottom = row["bbox"]
        row["bbox"] = [left, top, right - left, bottom - top]
        row["area"] = row["bbox"][2] * row["bbox"][3] if not row.get("segmentation") else None
    return len(annotations)


def is_dropped(row: Mapping[str, Any], file: CocoFile) -> bool:
    """Return whether a training drops an annotation for its box or mask."""
    image = file.images[row["image_id"]]
    size = (image["height"], image["width"]) if "height" in image else None
    mask = row.get("segmentation")
    return not is_box(row.get("bbox")) or (bool(mask) and sound_mask(mask, size) is None)
