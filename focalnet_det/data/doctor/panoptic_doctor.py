"""Diagnose a COCO panoptic dataset: its JSON, PNGs and images."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ..instances.mappers import size_mismatch_message
from ..io.issues import DataError
from ..io.json_files import read_json_lists
from ..io.labels import UnreadableLabelsError
from ..io.panoptic_rows import PANOPTIC_LISTS
from ..io.read_image import UnreadableImageError, read_rgb
from ..panoptic.segments import (
    Record,
    category_problems,
    read_panoptic_json,
    read_segment_ids,
    segment_pixels,
    segment_problems,
)
from ..shapes.export import mask_box
from .findings import Finding, findings_from_errors

# Problem -> (remedy, fatal).
REMEDIES = {
    "missing categories": ("List the classes under `categories`.", True),
    "duplicate categories": ("Use a unique id and name for each.", True),
    "categories that are both thing and stuff": ("Set isthing to either 0 or 1.", True),
    "images without annotation": ("They are ignored. Annotate or remove them.", False),
    "images annotated twice": ("Merge the annotations, or remove one.", True),
    "annotations of an unlisted image": ("Add the image to `images`, or remove them.", True),
    "missing images": ("Check the image folder, and file_name of images.", True),
    "unreadable images": ("Copy them again, or remove them.", True),
    "missing PNGs": ("Check the PNG folder, and file_name of annotations.", True),
    "unreadable PNGs": ("Segment ids are colors of an RGB PNG: R + 256 G + 65536 B.", True),
    "PNGs whose size differs from the image": (
        "Resize with nearest-neighbor interpolation, or use the matching file. Sizes are those of "
        "the image after EXIF rotation.",
        True,
    ),
    "segments with id 0": ("0 means void. Use another id.", True),
    "duplicate segment ids": (
        "Use a unique id and color for each segment of an image; with duplicates, PQ can exceed "
        "100.",
        True,
    ),
    "segments without pixels": ("Remove them from the JSON, or draw them in the PNG.", True),
    "segments with an unknown category": ("Add the category, or correct category_id.", True),
    "pixels of an unlisted segment": ("List the segment, or set these pixels to 0 (void).", True),
    "areas that disagree with the PNG": (
        "Correct them. They are not used here, but panopticapi computes IoU from them.",
        False,
    ),
    "boxes that disagree with the PNG": ("Correct them. They are not used here.", False),
    "missing things or stuff": (
        "Panoptic segmentation needs both. Train instance or semantic segmentation instead.",
        True,
    ),
    "classes without segments": ("They cannot be learned or evaluated. Add images.", False),
}


def verify_panoptic(panoptic_json: Path, panoptic_root: Path, images: Path) -> list[Finding]:
    """Check a panoptic JSON, its PNGs and its images.

    Args:
        panoptic_json: annotation file.
        panoptic_root: folder of the PNGs.
        images: image folder.
    Returns: findings, none if the data is valid.
    Raises: FileNotFoundError if the JSON is missing, ValueError if it is not in COCO's panoptic
        format.
    """
    try:
        read_panoptic_json(panoptic_json)
    except DataError as error:
        # Continue if the checks below report the same errors, with all examples.
        if error.errors is None or not set(error.errors.counts) <= set(REMEDIES):
            if error.errors is None:
                raise
            return list(findings_from_errors(error.errors))
    content = read_json_lists(panoptic_json, PANOPTIC_LISTS, "COCO panoptic")
    examples: dict[str, list[str]] = defaultdict(list)
    for problem, detail in (
        *category_problems(content["categories"]),
        *_check_lists(content),
        *_check_files(content, Path(panoptic_root), Path(images)),
        *_check_classes(content),
    ):
        examples[problem].append(detail)
    return [
        Finding(problem=problem, remedy=remedy, examples=tuple(examples[problem]), fatal=fatal)
        for problem, (remedy, fatal) in REMEDIES.items()
        if examples[problem]
    ]


def _check_lists(content: Record) -> Iterator[tuple[str, str]]:
    listed = {image["id"] for image in content["images"]}
    counts = Counter(annotation["image_id"] for annotation in content["annotations"])
    for image_id, count in counts.items():
        if image_id not in listed:
            yield "annotations of an unlisted image", f"image {image_id}"
        if count > 1:
            yield "images annotated twice", f"image {image_id}"
    for image in content["images"]:
        if image["id"] not in counts:
            yield "images without annotation", str(image["file_name"])


def _check_files(content: Record, root: Path, images: Path) -> Iterator[tuple[str, str]]:
    categories = {category["id"] for category in content["categories"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in names:
            continue
        size = None
        path = images / names[annotation["image_id"]]
        try:
            upright, _ = read_rgb(path)
            size = (upright.height, upright.width)
        except FileNotFoundError:
            yield "missing images", str(path)
        except UnreadableImageError:
            yield "unreadable images", str(path)
        yield from _check_png(annotation, root, size, categories)


def _check_png(
    annotation: Record, root: Path, size: tuple[int, int] | None, categories: Collection[int]
) -> Iterator[tuple[str, str]]:
    path = root / annotation["file_name"]
    try:
        ids = read_segment_ids(path)
    except FileNotFoundError:
        yield "missing PNGs", str(path)
        return
    except UnreadableLabelsError as error:
        yield "unreadable PNGs", str(error)
        return
    if size is not None and ids.shape != size:
        message = size_mismatch_message(path, ids.shape, size)
        yield "PNGs whose size differs from the image", message
    pixels = segment_pixels(ids)
    segments = annotation["segments_info"]
    for problem, detail in segment_problems(pixels, segments, categories):
        yield problem, f"{annotation['file_name']}: {detail}"
    for segment in segments:
        if segment["id"] not in pixels:
            continue
        box = mask_box(ids == segment["id"])
        yield from _check_area_and_box(annotation, segment, pixels, box)


def _check_area_and_box(
    annotation: Record, segment: Record, pixels: Mapping[int, int], box: list[int]
) -> Iterator[tuple[str, str]]:
    where = f"{annotation['file_name']}: id {segment['id']}"
    area = segment.get("area", pixels[segment["id"]])
    if area != pixels[segment["id"]]:
        yield (
            "areas that disagree with the PNG",
            f"{where}: {area} in the JSON, {pixels[segment['id']]} in the PNG",
        )
    if list(segment.get("bbox", box)) != box:
        yield (
            "boxes that disagree with the PNG",
            f"{where}: {segment['bbox']} in the JSON, {box} in the PNG",
        )


def _check_classes(content: Record) -> Iterator[tuple[str, str]]:
    kinds = {bool(category["isthing"]) for category in content["categories"]}
    for kind, detail in ((True, "no thing"), (False, "no stuff")):
        if kind not in kinds:
            yield "missing things or stuff", detail
    used = {s["category_id"] for a in content["annotations"] for s in a["segments_info"]}
    for category in content["categories"]:
        if category["id"] not in used:
            yield "classes without segments", str(category["name"])
