"""What is wrong with a COCO panoptic set, and how to mend it."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ..instances.mappers import size_message
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
from .findings import Finding, findings_of_faults

# Problem: remedy, whether it is fatal.
REMEDIES = {
    "categories missing": ("List them.", True),
    "categories listed twice": ("Give each an id and a name of its own.", True),
    "categories that are thing and stuff": ("Decide: isthing is 0 or 1.", True),
    "images without annotation": ("They are left out: annotate them, or remove them.", False),
    "images annotated twice": ("Merge the annotations, or remove one.", True),
    "annotations of an unlisted image": ("Add the image to the JSON, or remove them.", True),
    "missing images": ("Check the image folder, and file_name of images.", True),
    "unreadable images": ("Copy them again, or remove them.", True),
    "missing PNGs": ("Check the PNG folder, and file_name of annotations.", True),
    "unreadable PNGs": ("Segments are colours of an RGB PNG: R + 256 G + 65536 B.", True),
    "PNGs of another size than the image": (
        "Resize with nearest-neighbour interpolation, or find the right one. An image that EXIF "
        "rotates is taken upright.",
        True,
    ),
    "segments with the id of void": ("0 means no segment: give it another id.", True),
    "segment ids that repeat": (
        "Give each segment of an image an id and a colour of its own; with one id for two, PQ "
        "can exceed 100.",
        True,
    ),
    "segments without pixels": ("Remove them from the JSON, or draw them in the PNG.", True),
    "segments of no category": ("Add the category, or correct category_id.", True),
    "pixels of no listed segment": ("List the segment, or make these pixels 0 (void).", True),
    "areas that disagree with the PNG": (
        "Correct them: they are not used here, but panopticapi computes IoU from them.",
        False,
    ),
    "boxes that disagree with the PNG": ("Correct them: they are not used here.", False),
    "things or stuff missing": (
        "Panoptic segmentation needs both; train instance or semantic segmentation.",
        True,
    ),
    "classes without a segment": ("They cannot be learned or measured: add images.", False),
}


def verify_panoptic(panoptic_json: Path, panoptic_root: Path, images: Path) -> list[Finding]:
    """Checks a panoptic JSON, its PNGs and its images.

    Returns: findings, none if all is well.
    Raises: FileNotFoundError if the JSON is missing, ValueError if it is not in COCO's panoptic
        format.
    """
    try:
        read_panoptic_json(panoptic_json)
    except DataError as error:
        # What the checks below know, they explain with all examples.
        if error.faults is None or not set(error.faults.counts) <= set(REMEDIES):
            if error.faults is None:
                raise
            return list(findings_of_faults(error.faults))
    content = read_json_lists(panoptic_json, PANOPTIC_LISTS, "COCO panoptic")
    found: dict[str, list[str]] = defaultdict(list)
    for problem, detail in (
        *category_problems(content["categories"]),
        *_problems_of_lists(content),
        *_problems_of_files(content, Path(panoptic_root), Path(images)),
        *_problems_of_classes(content),
    ):
        found[problem].append(detail)
    return [
        Finding(problem=problem, remedy=remedy, examples=tuple(found[problem]), fatal=fatal)
        for problem, (remedy, fatal) in REMEDIES.items()
        if found[problem]
    ]


def _problems_of_lists(content: Record) -> Iterator[tuple[str, str]]:
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


def _problems_of_files(content: Record, root: Path, images: Path) -> Iterator[tuple[str, str]]:
    categories = {category["id"] for category in content["categories"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in names:
            continue
        size = None
        picture = images / names[annotation["image_id"]]
        try:
            upright, _ = read_rgb(picture)
            size = (upright.height, upright.width)
        except FileNotFoundError:
            yield "missing images", str(picture)
        except UnreadableImageError:
            yield "unreadable images", str(picture)
        yield from _problems_of_png(annotation, root, size, categories)


def _problems_of_png(
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
        yield "PNGs of another size than the image", size_message(path, ids.shape, size)
    pixels = segment_pixels(ids)
    segments = annotation["segments_info"]
    for problem, detail in segment_problems(pixels, segments, categories):
        yield problem, f"{annotation['file_name']}: {detail}"
    for segment in segments:
        if segment["id"] not in pixels:
            continue
        box = mask_box(ids == segment["id"])
        yield from _wrong_numbers(annotation, segment, pixels, box)


def _wrong_numbers(
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


def _problems_of_classes(content: Record) -> Iterator[tuple[str, str]]:
    kinds = {bool(category["isthing"]) for category in content["categories"]}
    for kind, name in ((True, "no thing"), (False, "no stuff")):
        if kind not in kinds:
            yield "things or stuff missing", name
    used = {s["category_id"] for a in content["annotations"] for s in a["segments_info"]}
    for category in content["categories"]:
        if category["id"] not in used:
            yield "classes without a segment", str(category["name"])
