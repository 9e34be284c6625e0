"""Make class folders of the objects of a COCO file: from detection to classification."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..io.coco_files import read_coco
from ..io.read_image import read_image
from ..io.write_image import write_png
from ..shapes.generate import default_root

logger = logging.getLogger("focalnet_det")

# Fraction of an object's sides that is added around it on each side.
MARGIN = 0.1


def export_crops(
    coco_json: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    classes: list[str] | None = None,
    largest: int | None = None,
    most: int | None = None,
    min_side: int = 16,
) -> dict[str, int]:
    """Write each object of a COCO file as an image into the folder of its category.

    Crowds, and objects whose shorter side is small, are left out. Files have the names of image
    and annotation ids, so that exporting again replaces them.

    Args:
        coco_json: annotations.
        images: folder of the images.
        output: folder, whose subfolders are the categories.
        classes: names of the categories to write; None for all of them.
        largest: write the categories with the most objects only, this many.
        most: objects of a category, which balances them; None for all.
        min_side: pixels.
    Returns: {category: objects written}, also of empty categories.
    Raises: ValueError if the file cannot be used, or a name is not that of a category.
    """
    file = read_coco(coco_json, images)
    names = {row["id"]: str(row["name"]) for row in file.categories}
    unknown = sorted(set(classes or ()) - set(names.values()))
    if unknown:
        raise ValueError(f"{coco_json} has no category {', '.join(unknown)}.")
    objects = _objects_by_image(file.annotations, min_side)
    chosen = classes or list(names.values())
    if largest is not None:
        counts = Counter(names[row["category_id"]] for rows in objects.values() for row in rows)
        chosen = [name for name, _ in counts.most_common(largest) if name in chosen]
    for name in chosen:
        (Path(output) / name.replace("/", "_")).mkdir(parents=True, exist_ok=True)
    written = dict.fromkeys(chosen, 0)
    for image_id, rows in sorted(objects.items()):
        picture: NDArray[np.uint8] | None = None
        for row in rows:
            name = names[row["category_id"]]
            if name not in written or written[name] == most:
                continue
            if picture is None:
                picture = read_image(Path(images) / file.images[image_id]["file_name"], "RGB")
            file_name = f"{image_id}_{row['id']}.png"
            path = Path(output) / name.replace("/", "_") / file_name
            write_png(path, crop(picture, row["bbox"]))
            written[name] += 1
    return written


def _objects_by_image(
    annotations: Iterable[dict[str, Any]], min_side: int
) -> dict[int, list[dict[str, Any]]]:
    """Return the objects of each image that are large enough, without crowds."""
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in annotations:
        if not row.get("iscrowd") and min(row["bbox"][2:]) >= min_side:
            objects[row["image_id"]].append(row)
    return objects


def crop(image: NDArray[np.uint8], box: list[float]) -> NDArray[np.uint8]:
    """Return a square around a box as far as the image reaches, (h, w, 3).

    Args:
        image: uint8 (H, W, 3).
        box: xywh, pixels.
    """
    x, y, width, height = box
    side = (1 + 2 * MARGIN) * max(width, height)
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    columns = slice(max(0, math.floor(left)), min(image.shape[1], math.ceil(left + side)))
    rows = slice(max(0, math.floor(top)), min(image.shape[0], math.ceil(top + side)))
    return image[rows, columns]


def export_shapes() -> dict[str, int]:
    """Write the objects of the generated shapes, which ``shapes_classes_*`` are; see above."""
    root, total = default_root(), Counter[str]()
    for split in ("train", "val"):
        total.update(
            export_crops(
                root / f"annotations/instances_{split}.json",
                root / "images" / split,
                root / "classes" / split,
            )
        )
    return dict(total)
