"""Write the labels of the generated dataset `shapes`: COCO, COCO panoptic, Detectron2 and ADE20K.

All of them derive from one owner map per image, so they agree by construction.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_utils

from focalnet_det.data.shapes.scene import FIRST_OBJECT, STUFF_CLASSES, THING_CLASSES, Scene

Record = dict[str, Any]

# Category ids have gaps, like COCO's, so that code that confuses ids and indices fails.
THING_IDS: tuple[int, ...] = (1, 2, 4, 5, 8, 9)
STUFF_IDS: tuple[int, ...] = (21, 22, 25, 28)
COLORS: tuple[tuple[int, int, int], ...] = (
    *((220, 60, 70), (60, 130, 220), (250, 190, 60), (130, 80, 200), (240, 130, 40)),
    *((40, 170, 150), (150, 200, 235), (120, 170, 80), (180, 120, 100), (70, 110, 160)),
)
SEMSEG_IGNORE = 255
ADE_NAMES = {"train": "training", "val": "validation"}
MIN_POLYGON_IOU = 0.98
PNG_LEVEL = 3


@dataclass(frozen=True)
class Split:
    """Split of the dataset: `name` is train or val, and image ids start at `first_id`."""

    name: str
    index: int
    first_id: int


SPLITS = (Split("train", 0, 1), Split("val", 1, 900001))


def categories() -> list[Record]:
    """Return all categories, things first, with their label in each layout."""
    rows: list[Record] = []
    names, ids = THING_CLASSES + STUFF_CLASSES, THING_IDS + STUFF_IDS
    for index, (name, category_id) in enumerate(zip(names, ids, strict=True)):
        isthing = index < len(THING_CLASSES)
        row = {
            "id": category_id,
            "name": name,
            "supercategory": "shape" if isthing else "texture",
            "isthing": int(isthing),
            "color": list(COLORS[index]),
            "panoptic_semseg_label": 0 if isthing else index - len(THING_CLASSES) + 1,
            "ade_label": index + 1,
        }
        rows.append(row)
    return rows


def mask_box(mask: NDArray[np.bool_]) -> list[int]:
    """Return the bounding box of a mask, (H, W), as xywh, pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def encode_rle(mask: NDArray[np.bool_]) -> Record:
    """Encode a mask, (H, W), as compressed RLE with `counts` as str."""
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def trace_polygons(mask: NDArray[np.bool_], tolerance: float) -> list[list[float]] | None:
    """Trace the outlines of a mask.

    Args:
        mask: (H, W).
        tolerance: largest distance of the polygon to the outline, pixels.
    Returns: polygons [x0, y0, x1, ...], pixels; None if there is none or a part has a hole.
    """
    zoom = 4
    left, top, width, height = mask_box(mask)
    crop = mask[top : top + height, left : left + width].astype(np.uint8)
    # Contours pass through pixel centers; on an upsampled mask, these are close to pixel edges.
    large = np.pad(crop.repeat(zoom, axis=0).repeat(zoom, axis=1), 1)
    contours, tree = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if (tree[0, :, 3] >= 0).any():
        return None
    polygons = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, tolerance * zoom, True).reshape(-1, 2)
        if len(points) < 3:
            continue
        xy = (points - 0.5) / zoom + (left, top)
        polygons.append([round(float(value), 2) for value in xy.reshape(-1)])
    return polygons or None


def segmentation(mask: NDArray[np.bool_]) -> list[list[float]] | Record:
    """Encode a mask as polygons if they are accurate (IoU of 0.98 or more), else as RLE."""
    exact = encode_rle(mask)
    height, width = mask.shape
    for tolerance in (0.6, 0.3):
        polygons = trace_polygons(mask, tolerance)
        if polygons is None:
            break
        traced = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
        if mask_utils.iou([traced], [exact], [0])[0, 0] >= MIN_POLYGON_IOU:
            return polygons
    return exact


def _segment_ids(rng: Generator, count: int) -> NDArray[np.int64]:
    """Sample distinct bright colors as ids R + 256 G + 65536 B, excluding 0."""
    ids: dict[int, None] = {}
    while len(ids) < count:
        red, green, blue = (int(value) for value in rng.integers(40, 256, 3))
        ids[red + 256 * green + 65536 * blue] = None
    return np.array(list(ids), dtype=np.int64)


def annotate_scene(
    scene: Scene, rng: Generator
) -> tuple[list[Record], list[Record], NDArray[np.int64]]:
    """Return instances, panoptic segments, and the id map (H, W) of the panoptic PNG, 0 = void."""
    labels = [int(label) for label in np.unique(scene.owner) if label > 0]
    table = np.zeros(FIRST_OBJECT + len(scene.objects), dtype=np.int64)
    table[labels] = _segment_ids(rng, len(labels))
    instances, segments = [], []
    for label in labels:
        mask = scene.owner == label
        item = scene.objects[label - FIRST_OBJECT] if label >= FIRST_OBJECT else None
        record: Record = {
            "category_id": STUFF_IDS[label - 1] if item is None else THING_IDS[item.class_index],
            "iscrowd": int(item is not None and item.crowd),
            "area": int(np.count_nonzero(mask)),
            "bbox": mask_box(mask),
        }
        segments.append({"id": int(table[label]), **record})
        if item is not None:
            shape = encode_rle(mask) if item.crowd else segmentation(mask)
            instances.append({**record, "segmentation": shape})
    return instances, segments, table[scene.owner]


def semantic_labels(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return label maps (H, W) of Panoptic FPN (0 things, 1.. stuff, 255 ignored) and ADE20K."""
    things = len(THING_CLASSES)
    stuff = range(1, FIRST_OBJECT)
    semseg = [SEMSEG_IGNORE, *stuff, *(0 for _ in scene.objects)]
    ade = [0, *(things + label for label in stuff), *(o.class_index + 1 for o in scene.objects)]
    lookups = (np.array(values, dtype=np.uint8) for values in (semseg, ade))
    first, second = (lookup[scene.owner] for lookup in lookups)
    return first, second


def output_folders(root: Path, split: str) -> dict[str, Path]:
    """Return the output folders of one split."""
    return {
        "images": root / "images" / split,
        "panoptic": root / f"panoptic_{split}",
        "semseg": root / f"panoptic_semseg_{split}",
        "ade_images": root / "ade" / "images" / ADE_NAMES[split],
        "ade_labels": root / "ade" / "annotations" / ADE_NAMES[split],
    }


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, target)


def write_sample(
    root: Path, split: Split, index: int, scene: Scene, image: NDArray[np.uint8], rng: Generator
) -> Record:
    """Write one image and its label maps, and return its entries in the JSON files."""
    image_id = split.first_id + index
    stem = f"{image_id:06d}"
    folders = output_folders(root, split.name)
    instances, segments, ids = annotate_scene(scene, rng)
    semseg, ade = semantic_labels(scene)
    picture = folders["images"] / f"{stem}.jpg"
    Image.fromarray(image).save(picture, quality=95, subsampling=0)
    _link(picture, folders["ade_images"] / picture.name)
    colors = np.stack((ids % 256, ids // 256 % 256, ids // 65536), axis=-1).astype(np.uint8)
    Image.fromarray(colors).save(folders["panoptic"] / f"{stem}.png", compress_level=PNG_LEVEL)
    Image.fromarray(semseg).save(folders["semseg"] / f"{stem}.png", compress_level=PNG_LEVEL)
    Image.fromarray(ade).save(folders["ade_labels"] / f"{stem}.png", compress_level=PNG_LEVEL)
    height, width = scene.owner.shape
    return {
        "image": {"id": image_id, "file_name": picture.name, "width": width, "height": height},
        "instances": [{"image_id": image_id, **row} for row in instances],
        "panoptic": {
            "image_id": image_id,
            "file_name": f"{stem}.png",
            "segments_info": segments,
        },
    }


def json_files(split: Split, records: list[Record], info: Record) -> dict[str, Record]:
    """Build the contents of the two annotation files of a split, by file name."""
    rows = categories()
    keys = ("id", "name", "supercategory")
    images = [record["image"] for record in records]
    flat = [row for record in records for row in record["instances"]]
    annotations = [{"id": split.first_id + number, **row} for number, row in enumerate(flat)]
    common: Record = {"info": info, "licenses": [], "images": images}
    things = [{key: row[key] for key in keys} for row in rows if row["isthing"]]
    everything = [{key: row[key] for key in (*keys, "isthing", "color")} for row in rows]
    segments = [record["panoptic"] for record in records]
    return {
        f"instances_{split.name}.json": {
            **common,
            "annotations": annotations,
            "categories": things,
        },
        f"panoptic_{split.name}.json": {
            **common,
            "annotations": segments,
            "categories": everything,
        },
    }
