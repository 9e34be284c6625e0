"""Rows of a COCO panoptic JSON: each is checked, and all faults are shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .issues import Faults, shown
from .json_files import Place, Record, is_id, read_json_lists, whole

# R + 256 G + 65536 B of a PNG.
LARGEST_SEGMENT = 256**3 - 1
VOID = 0
PANOPTIC_LISTS = ("images", "annotations", "categories")

REMEDIES = {
    "categories missing": "List the classes, things and stuff, under `categories`.",
    "categories without id, name or isthing": "Give each a whole number, a name, and isthing 0 or "
    "1.",
    "categories listed twice": "Give each an id and a name of its own.",
    "categories that are thing and stuff": "Decide: isthing is 0 or 1.",
    "file lists no images": "List the images under `images`.",
    "images without id or file_name": "Give each a whole number and the path below the image "
    "folder.",
    "image ids that repeat": "Give each image an id of its own, and correct image_id of its "
    "annotation.",
    "images with a malformed width or height": "Give the pixels of the upright image, or leave "
    "both out.",
    "annotations without image_id, file_name or segments_info": "Give the id of an image, the PNG "
    "below the folder of PNGs, and the list of its segments.",
    "annotations of an unlisted image": "Add the image to the JSON, or remove them.",
    "images annotated twice": "Merge the annotations, or remove one.",
    "segments without id or category_id": "Give each a whole number and a category.",
    "segments with an id that no color is": f"Ids are R + 256 G + 65536 B, at most "
    f"{LARGEST_SEGMENT}.",
    "segments with the id of void": "0 means no segment: give it another id.",
    "segment ids that repeat": "Give each segment of an image an id and a color of its own; with "
    "one id for two, PQ can exceed 100.",
    "segments of no category": "Add the category, or correct category_id.",
    "segments with a malformed iscrowd": "Write 0 or 1.",
    "images without annotation": "Annotate at least one image.",
}


def read_panoptic_rows(
    path: Path,
) -> tuple[dict[int, Record], dict[int, Record], dict[int, Record]]:
    """Read and check a panoptic JSON.

    Returns: images by id, annotations by image id, and categories by id, in order of id.
    Raises: FileNotFoundError if there is no such file, DataError with all faults.
    """
    content = read_json_lists(path, PANOPTIC_LISTS, "COCO panoptic")
    faults = Faults(path, REMEDIES)
    categories = _categories(content["categories"], faults)
    images = _images(content["images"], faults)
    annotations = _annotations(content["annotations"], images, categories, faults)
    if not annotations and not faults:
        faults.add("images without annotation", f"{len(images)} images")
    faults.stop()
    return images, annotations, {key: categories[key] for key in sorted(categories)}


def _categories(rows: list[Record], faults: Faults) -> dict[int, Record]:
    found: dict[int, Record] = {}
    names: dict[str, Record] = {}
    if not rows:
        faults.add("categories missing")
    for index, row in enumerate(rows):
        where, key, name = Place("categories", index, row), row.get("id"), row.get("name")
        kind = row.get("isthing")
        named = isinstance(name, str) and bool(name.strip())
        if not is_id(key) or not named or not isinstance(kind, int) or kind not in (0, 1):
            faults.add("categories without id, name or isthing", where)
            continue
        earlier = found.get(key) or names.get(str(name))
        if earlier is not None:
            same = bool(earlier["isthing"]) == bool(kind)
            problem = "categories listed twice" if same else "categories that are thing and stuff"
            faults.add(problem, f"{where}, {shown(name)}")
        found.setdefault(key, row)
        names.setdefault(str(name), row)
    return found


def _images(rows: list[Record], faults: Faults) -> dict[int, Record]:
    found: dict[int, Record] = {}
    if not rows:
        faults.add("file lists no images")
    for index, row in enumerate(rows):
        where, key, name = Place("images", index, row), row.get("id"), row.get("file_name")
        if not is_id(key) or not _is_path(name):
            faults.add("images without id or file_name", where)
            continue
        if key in found:
            faults.add("image ids that repeat", where)
        sides = [row.get("height"), row.get("width")]
        if sides != [None, None] and None in map(whole, sides):
            faults.add("images with a malformed width or height", f"{where}: {shown(sides)}")
        found[key] = row
    return found


def _annotations(
    rows: list[Record],
    images: Mapping[int, Record],
    categories: Mapping[int, Record],
    faults: Faults,
) -> dict[int, Record]:
    found: dict[int, Record] = {}
    for index, row in enumerate(rows):
        key, name, segments = (row.get(k) for k in ("image_id", "file_name", "segments_info"))
        where = f"annotations[{index}] (image {shown(key)})"
        listed = isinstance(segments, list) and all(isinstance(s, dict) for s in segments)
        if not is_id(key) or not _is_path(name) or not listed:
            faults.add("annotations without image_id, file_name or segments_info", where)
            continue
        if key not in images:
            faults.add("annotations of an unlisted image", where)
        elif key in found:
            faults.add("images annotated twice", where)
        found[key] = row
        _check_segments(row["segments_info"], where, categories, faults)
    return found


def _check_segments(
    segments: list[Record], where: object, categories: Mapping[int, Record], faults: Faults
) -> None:
    seen: set[int] = set()
    for index, segment in enumerate(segments):
        place = Place(f"{where}.segments_info", index, segment)
        key, category = segment.get("id"), segment.get("category_id")
        if not is_id(key) or not is_id(category):
            faults.add("segments without id or category_id", place)
            continue
        if category not in categories:
            faults.add("segments of no category", f"{place}: category {category}")
        if key == VOID:
            faults.add("segments with the id of void", place)
        elif key > LARGEST_SEGMENT:
            faults.add("segments with an id that no color is", place)
        elif key in seen:
            faults.add("segment ids that repeat", place)
        seen.add(key)
        crowd = segment.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            faults.add("segments with a malformed iscrowd", f"{place}: {shown(crowd)}")


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and "\0" not in name
