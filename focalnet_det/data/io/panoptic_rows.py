"""Validate each row of a COCO panoptic JSON, and report all errors together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .issues import ValidationErrors, shorten
from .json_files import Record, RowLocation, is_id, positive_int, read_json_lists

# Largest id of a color: R + 256 G + 65536 B.
MAX_SEGMENT_ID = 256**3 - 1
VOID = 0
PANOPTIC_LISTS = ("images", "annotations", "categories")

REMEDIES = {
    "missing categories": "List the classes, things and stuff, under `categories`.",
    "categories without id, name or isthing": "Set id to an integer and isthing to 0 or 1, and "
    "add a name.",
    "duplicate categories": "Use a unique id and name for each.",
    "categories that are both thing and stuff": "Set isthing to either 0 or 1.",
    "missing images": "List the images under `images`.",
    "images without id or file_name": "Set id to an integer and file_name to the path below the "
    "image folder.",
    "duplicate image ids": "Use a unique id for each image, and correct image_id of its "
    "annotation.",
    "images with a malformed width or height": "Set both to pixels of the upright image, or "
    "remove both.",
    "annotations without image_id, file_name or segments_info": "Set them to the id of an image, "
    "the path below the folder of PNGs, and the list of segments.",
    "annotations of an unlisted image": "Add the image to `images`, or remove them.",
    "images annotated twice": "Merge the annotations, or remove one.",
    "segments without id or category_id": "Set both to integers.",
    "segments with an id out of range": f"Ids are R + 256 G + 65536 B, at most {MAX_SEGMENT_ID}.",
    "segments with id 0": "0 means void. Use another id.",
    "duplicate segment ids": "Use a unique id and color for each segment of an image; with "
    "duplicates, PQ can exceed 100.",
    "segments with an unknown category": "Add the category, or correct category_id.",
    "segments with a malformed iscrowd": "Set it to 0 or 1.",
    "images without annotation": "Annotate at least one image.",
}


def read_panoptic_rows(
    path: Path,
) -> tuple[dict[int, Record], dict[int, Record], dict[int, Record]]:
    """Read and validate a panoptic JSON.

    Returns: images by id, annotations by image id, and categories by id, in order of id.
    Raises: FileNotFoundError if the file does not exist, DataError with all errors.
    """
    content = read_json_lists(path, PANOPTIC_LISTS, "COCO panoptic")
    errors = ValidationErrors(path, REMEDIES)
    categories = _categories(content["categories"], errors)
    images = _images(content["images"], errors)
    annotations = _annotations(content["annotations"], images, categories, errors)
    if not annotations and not errors:
        errors.add("images without annotation", f"{len(images)} images")
    errors.raise_if_any()
    return images, annotations, {key: categories[key] for key in sorted(categories)}


def _categories(rows: list[Record], errors: ValidationErrors) -> dict[int, Record]:
    found: dict[int, Record] = {}
    names: dict[str, Record] = {}
    if not rows:
        errors.add("missing categories")
    for index, row in enumerate(rows):
        where, key, name = RowLocation("categories", index, row), row.get("id"), row.get("name")
        kind = row.get("isthing")
        named = isinstance(name, str) and bool(name.strip())
        if not is_id(key) or not named or not isinstance(kind, int) or kind not in (0, 1):
            errors.add("categories without id, name or isthing", where)
            continue
        earlier = found.get(key) or names.get(str(name))
        if earlier is not None:
            same = bool(earlier["isthing"]) == bool(kind)
            problem = "duplicate categories" if same else "categories that are both thing and stuff"
            errors.add(problem, f"{where}, {shorten(name)}")
        found.setdefault(key, row)
        names.setdefault(str(name), row)
    return found


def _images(rows: list[Record], errors: ValidationErrors) -> dict[int, Record]:
    found: dict[int, Record] = {}
    if not rows:
        errors.add("missing images")
    for index, row in enumerate(rows):
        where, key, name = RowLocation("images", index, row), row.get("id"), row.get("file_name")
        if not is_id(key) or not _is_path(name):
            errors.add("images without id or file_name", where)
            continue
        if key in found:
            errors.add("duplicate image ids", where)
        sides = [row.get("height"), row.get("width")]
        if sides != [None, None] and None in map(positive_int, sides):
            errors.add("images with a malformed width or height", f"{where}: {shorten(sides)}")
        found[key] = row
    return found


def _annotations(
    rows: list[Record],
    images: Mapping[int, Record],
    categories: Mapping[int, Record],
    errors: ValidationErrors,
) -> dict[int, Record]:
    found: dict[int, Record] = {}
    for index, row in enumerate(rows):
        key, name, segments = (row.get(k) for k in ("image_id", "file_name", "segments_info"))
        where = f"annotations[{index}] (image {shorten(key)})"
        listed = isinstance(segments, list) and all(isinstance(s, dict) for s in segments)
        if not is_id(key) or not _is_path(name) or not listed:
            errors.add("annotations without image_id, file_name or segments_info", where)
            continue
        if key not in images:
            errors.add("annotations of an unlisted image", where)
        elif key in found:
            errors.add("images annotated twice", where)
        found[key] = row
        _check_segments(row["segments_info"], where, categories, errors)
    return found


def _check_segments(
    segments: list[Record],
    where: object,
    categories: Mapping[int, Record],
    errors: ValidationErrors,
) -> None:
    seen: set[int] = set()
    for index, segment in enumerate(segments):
        place = RowLocation(f"{where}.segments_info", index, segment)
        key, category = segment.get("id"), segment.get("category_id")
        if not is_id(key) or not is_id(category):
            errors.add("segments without id or category_id", place)
            continue
        if category not in categories:
            errors.add("segments with an unknown category", f"{place}: category {category}")
        if key == VOID:
            errors.add("segments with id 0", place)
        elif key > MAX_SEGMENT_ID:
            errors.add("segments with an id out of range", place)
        elif key in seen:
            errors.add("duplicate segment ids", place)
        seen.add(key)
        crowd = segment.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            errors.add("segments with a malformed iscrowd", f"{place}: {shorten(crowd)}")


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and "\0" not in name
