"""Small sound files of each format, and ways to damage them."""

import copy
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.paths import ROOT

TOOL = ROOT / "tools/verify_dataset.py"
WIDTH, HEIGHT = 48, 32
Change = Callable[[Any], None]
NAN, INFINITY = float("nan"), float("inf")


def square(left: float, top: float, side: float) -> list[float]:
    """A polygon of four points."""
    right, bottom = left + side, top + side
    return [left, top, right, top, right, bottom, left, bottom]


def coco() -> dict[str, Any]:
    """Three images, two classes, two keypoints, six objects and a crowd."""
    images = [
        {"id": 10 + k, "file_name": f"{k}.png", "width": WIDTH, "height": HEIGHT} for k in range(3)
    ]
    annotations = [
        {
            "id": 100 + k,
            "image_id": 10 + k % 3,
            "category_id": 1 + k % 2,
            "bbox": [4.5 + k, 3.0, 12.0, 12.0],
            "area": 144.0,
            "iscrowd": 0,
            "segmentation": [square(4.5 + k, 3.0, 12.0)],
            "keypoints": [5 + k, 4, 2, 10 + k, 9, 1],
        }
        for k in range(6)
    ]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [100, 60, HEIGHT * WIDTH - 160]}
    annotations.append(
        {
            "id": 200,
            "image_id": 10,
            "category_id": 1,
            "bbox": [3.0, 4.0, 3.0, 28.0],
            "area": 60.0,
            "iscrowd": 1,
            "segmentation": crowd,
        }
    )
    points = ["left_eye", "right_eye"]
    categories = [{"id": k, "name": name, "keypoints": points} for k, name in ((1, "a"), (2, "b"))]
    return {"images": images, "annotations": annotations, "categories": categories}


def panoptic() -> dict[str, Any]:
    """Two images with a thing and stuff each; see ``write_pngs``."""
    images = [
        {"id": 10 + k, "file_name": f"{k}.png", "width": WIDTH, "height": HEIGHT} for k in range(2)
    ]
    annotations = [
        {
            "image_id": 10 + k,
            "file_name": f"{k}.png",
            "segments_info": [
                {"id": 1, "category_id": 1, "iscrowd": 0, "area": 100, "bbox": [0, 0, 10, 10]},
                {"id": 300, "category_id": 2, "iscrowd": 0, "area": 1436, "bbox": [0, 0, 48, 32]},
            ],
        }
        for k in range(2)
    ]
    categories = [
        {"id": 1, "name": "thing", "isthing": 1},
        {"id": 2, "name": "stuff", "isthing": 0},
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_images(folder: Path, count: int = 3) -> Path:
    """Noise of ``WIDTH`` x ``HEIGHT``."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for k in range(count):
        pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def write_pngs(folder: Path, count: int = 2) -> Path:
    """Segment 1 in the upper left corner, 10 x 10, segment 300 around it."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = 300 - 256, 1
    pixels[:10, :10] = (1, 0, 0)
    for k in range(count):
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def put(*path: Any) -> Change:
    """Sets a value: put("images", 0, "id", "x"); "*" for every element of a list."""
    *keys, last, value = path

    def change(content: Any) -> None:
        for target in _targets(content, keys):
            target[last] = copy.deepcopy(value)

    return change


def drop(*path: Any) -> Change:
    """Removes a key or an element."""
    *keys, last = path

    def change(content: Any) -> None:
        for target in _targets(content, keys):
            del target[last]

    return change


def add(*path: Any) -> Change:
    """Appends a value to a list."""
    *keys, value = path

    def change(content: Any) -> None:
        for target in _targets(content, keys):
            target.append(copy.deepcopy(value))

    return change


def both(*changes: Change) -> Change:
    """One change after another."""

    def change(content: Any) -> None:
        for single in changes:
            single(content)

    return change


def _targets(content: Any, keys: list[Any]) -> list[Any]:
    targets = [content]
    for key in keys:
        if key == "*":
            targets = [element for target in targets for element in target]
        else:
            targets = [target[key] for target in targets]
    return targets


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def run_tool(*arguments: object) -> int:
    """tools/verify_dataset.py in this process; returns its exit status."""
    before = sys.argv
    sys.argv = [str(TOOL), *map(str, arguments)]
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0
