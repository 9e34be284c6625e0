"""Convert ADE20K's published label images to COCO instance and panoptic annotations.

Category ids of both are the 150 classes of scene parsing, 0..149.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES
from numpy.typing import NDArray

from ...atomic import write_text
from ..instances.mappers import size_mismatch_message
from ..io.labels import IGNORE, UnreadableLabelsError, read_labels
from ..io.open_image import open_header, open_image
from ..io.panoptic_rows import VOID
from ..io.write_image import run_jobs, write_png
from ..semantic.ade20k import COUNTS, RULE
from ..semantic.label_folders import paired_files
from ..shapes.export import ADE_NAMES, encode_rle, mask_box
from .segments import Record, read_segment_ids, segment_colors

# Scene parsing class (1..150) of each of the 100 instance classes (1..100).
# Source: facebookresearch/Mask2Former:datasets/ade20k_instance_catid_mapping.txt.
THING_NUMBERS = (
    *(8, 9, 11, 13, 15, 16, 19, 20, 21, 23, 24, 25, 28, 31, 32, 33, 34, 36, 37, 38, 39, 40, 42),
    *(43, 44, 45, 46, 48, 50, 51, 54, 56, 57, 58, 59, 63, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75),
    *(76, 77, 79, 81, 82, 83, 84, 86, 87, 88, 89, 90, 91, 93, 94, 96, 98, 99, 103, 104, 105, 108),
    *(109, 111, 112, 113, 116, 117, 119, 120, 121, 122, 124, 125, 126, 127, 128, 130, 131, 133),
    *(134, 135, 136, 137, 138, 139, 140, 143, 144, 145, 147, 148, 149, 150),
)
THINGS = frozenset(number - 1 for number in THING_NUMBERS)
# Segment id = (category + 1) * STEP + instance number.
STEP = 256


def panoptic_categories() -> list[Record]:
    """Return the 150 categories, in order of id."""
    return [
        {"id": k, "name": name.strip(), "isthing": int(k in THINGS)}
        for k, name in enumerate(ADE20K_SEM_SEG_CATEGORIES)
    ]


def prepare_ade20k_instances(root: Path, *, workers: int, partial: bool = False) -> list[Path]:
    """Write ``ade20k_instance_{train,val}.json`` from ``annotations_instance``.

    Files are written atomically, and existing ones are skipped.

    Args:
        root: folder of the published ``images`` and ``annotations_instance``.
        workers: number of processes.
        partial: accept a subset of the published images.
    Returns: files written.
    Raises: ValueError if image counts, sizes or labels differ from the published ones,
        FileNotFoundError if a folder is missing.
    """
    things = [c for c in panoptic_categories() if c["isthing"]]
    categories = [{"id": c["id"], "name": c["name"]} for c in things]
    written = []
    for split, folder in ADE_NAMES.items():
        target = root / f"ade20k_instance_{split}.json"
        if target.exists():
            continue
        pairs = _pairs(root, folder, "annotations_instance", partial)
        images, annotations = [], []
        for image, rows in run_jobs(convert_instances, pairs, workers):
            images.append(image)
            annotations += rows
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        _write(target, images, annotations, categories)
        written.append(target)
    return written


def prepare_ade20k_panoptic(root: Path, *, workers: int, partial: bool = False) -> list[Path]:
    """Write ``ade20k_panoptic_{train,val}`` and the JSON files beside them.

    Stuff is taken from ``annotations``, things from ``annotations_instance``, which takes
    precedence. Pixels of thing classes outside any instance are void. Existing PNGs are skipped, so
    that an interrupted run can be resumed.

    Args:
        root: folder of the published ``images``, ``annotations`` and ``annotations_instance``.
        workers: number of processes.
        partial: accept a subset of the published images.
    Returns: JSON files.
    Raises: as ``prepare_ade20k_instances``.
    """
    written = []
    for split, folder in ADE_NAMES.items():
        scenes = dict(_pairs(root, folder, "annotations", partial))
        objects = _pairs(root, folder, "annotations_instance", partial)
        if missing := [image for image, _ in objects if image not in scenes]:
            raise ValueError(f"{missing[0]} has instances but no labels in annotations/{folder}.")
        target = root / f"ade20k_panoptic_{split}"
        jobs = [(i, scenes[i], png, target / f"{i.stem}.png") for i, png in objects]
        images, annotations = [], []
        for image, annotation in run_jobs(convert_segments, jobs, workers):
            images.append(image)
            annotations.append(annotation)
        path = root / f"{target.name}.json"
        _write(path, images, annotations, panoptic_categories())
        written.append(path)
    return written


def _pairs(root: Path, folder: str, labels: str, partial: bool) -> list[tuple[Path, Path]]:
    pairs = paired_files(root / "images" / folder, root / labels / folder)
    if len(pairs) != COUNTS[folder] and not partial:
        raise ValueError(
            f"{root} has {len(pairs)} images with {labels} in {folder} instead of the published "
            f"{COUNTS[folder]}. Unpack the archive again, or use --partial for a subset."
        )
    return pairs


def _write(
    path: Path,
    images: Sequence[Record],
    annotations: Sequence[Record],
    categories: Sequence[Record],
) -> None:
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_text(path, [json.dumps(content, separators=(",", ":")), "\n"])


def image_record(path: Path) -> Record:
    """Return the COCO entry of an image; its id is the number at the end of its name.

    Raises: ValueError if the name does not end in a number.
    """
    number = re.search(r"\d+$", path.stem)
    if number is None:
        raise ValueError(
            f"The name of {path} does not end in a number, as ADE20K's image names do."
        )
    with open_header(path) as header:
        width, height = header.size
    return {"id": int(number[0]), "file_name": path.name, "width": width, "height": height}


def read_instances(path: Path, image: Record) -> dict[int, tuple[int, NDArray[np.bool_]]]:
    """Read the instances of a label image.

    R is the instance class, 1..100, and G the number of the instance, 0 for none.

    Args:
        path: label image.
        image: COCO entry of the image.
    Returns: number -> (category id, bool mask (H, W)).
    Raises: UnreadableLabelsError if it is not RGB, ValueError if its size differs from the image,
        or an instance does not have exactly one class.
    """
    with open_image(path) as label_image:
        mode, pixels = label_image.mode, np.asarray(label_image)
    if mode != "RGB":
        raise UnreadableLabelsError(f"{path} is an image of mode {mode}, not RGB.")
    size = (image["height"], image["width"])
    if pixels.shape[:2] != size:
        raise ValueError(size_mismatch_message(path, pixels.shape, size))
    classes, numbers = pixels[..., 0], pixels[..., 1]
    instances = {}
    for number in np.unique(numbers[numbers > 0]).tolist():
        mask = numbers == number
        instance_classes = np.unique(classes[mask]).tolist()
        if len(instance_classes) != 1 or not 1 <= instance_classes[0] <= len(THING_NUMBERS):
            raise ValueError(
                f"{path}: instance {number} has class {', '.join(map(str, instance_classes))}; "
                f"expected a single class from 1 to {len(THING_NUMBERS)}."
            )
        instances[number] = (THING_NUMBERS[instance_classes[0] - 1] - 1, mask)
    return instances


def convert_instances(pair: tuple[Path, Path]) -> tuple[Record, list[Record]]:
    """Convert a pair of image and instance labels to its COCO entry and annotations without ids."""
    image = image_record(pair[0])
    rows = [
        {
            "image_id": image["id"],
            "category_id": category,
            "iscrowd": 0,
            "area": int(np.count_nonzero(mask)),
            "bbox": mask_box(mask),
            "segmentation": encode_rle(mask),
        }
        for category, mask in read_instances(pair[1], image).values()
    ]
    return image, rows


def convert_segments(job: tuple[Path, Path, Path, Path]) -> tuple[Record, Record]:
    """Write the panoptic PNG of (image, class labels, instance labels, PNG).

    Returns: COCO entry of the image, and its panoptic annotation.
    """
    image_path, labels_path, objects_path, target = job
    image = image_record(image_path)
    if not target.exists():
        ids = segment_ids(labels_path, objects_path, image)
        write_png(target, segment_colors(ids))
    written = read_segment_ids(target)
    segments = []
    for segment_id in np.unique(written[written != VOID]).tolist():
        mask = written == segment_id
        row: dict[str, Any] = {"id": segment_id, "category_id": segment_id // STEP - 1}
        area = int(np.count_nonzero(mask))
        segments.append({**row, "area": area, "bbox": mask_box(mask), "iscrowd": 0})
    return image, {"image_id": image["id"], "file_name": target.name, "segments_info": segments}


def segment_ids(labels_path: Path, objects_path: Path, image: Record) -> NDArray[np.int64]:
    """Combine class labels and instance labels to a map of segment ids, (H, W)."""
    labels = read_labels(labels_path, RULE)
    size = (image["height"], image["width"])
    if labels.shape != size:
        raise ValueError(size_mismatch_message(labels_path, labels.shape, size))
    stuff = ~np.isin(labels, [*THINGS, IGNORE])
    ids: NDArray[np.int64] = np.where(stuff, (labels + 1) * STEP, VOID)
    for number, (category, mask) in read_instances(objects_path, image).items():
        ids[mask] = (category + 1) * STEP + number
    return ids
