"""Records of one small picture with objects of every kind, and mappers for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_utils

from focalnet_det.data.instances.mappers import InstanceMapper

HEIGHT, WIDTH = 40, 60

TRIANGLE = [10.0, 5.0, 30.5, 5.0, 10.0, 25.25]

FLIPPED_POINTS = [1, 0]


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths by a slow loop over the columns."""
    runs, current = [0], 0
    for value in mask.T.reshape(-1).tolist():
        if value != current:
            runs.append(0)
            current = value
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def annotation(**changes: Any) -> dict[str, Any]:
    row = {
        "bbox": [10.25, 5.0, 20.5, 20.25],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 3,
        "iscrowd": 0,
        "segmentation": [list(TRIANGLE)],
        "keypoints": [12.5, 7.5, 2, 20.5, 6.5, 1],
    }
    row.update(changes)
    return {name: value for name, value in row.items() if value is not None}


def make_record(path: Path, annotations: Sequence[dict[str, Any]], **changes: Any) -> dict:
    return {
        "file_name": str(path),
        "image_id": 7,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": list(annotations),
        **changes,
    }


def mapper(**changes: Any) -> InstanceMapper:
    options: dict[str, Any] = {
        "is_train": True,
        "augmentations": [],
        "image_format": "RGB",
        "masks": True,
        "recompute_boxes": False,
    }
    return InstanceMapper(**{**options, **changes})


def map_one(path: Path, row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return mapper(**changes)(make_record(path, [row]))


def assert_same(
    found: dict[str, Any], expected: dict[str, Any], *, leave_out: Sequence[str] = ()
) -> None:
    """Every key, and every tensor bit by bit."""
    assert set(found) == set(expected)
    assert found["image"].dtype == torch.uint8
    assert torch.equal(found["image"], expected["image"])
    for name in set(found) - {"image", "instances"}:
        assert found[name] == expected[name]
    if "instances" not in expected:
        return
    mine, theirs = found["instances"], expected["instances"]
    assert mine.image_size == theirs.image_size
    assert set(mine.get_fields()) == set(theirs.get_fields())
    for name, value in theirs.get_fields().items():
        if name in leave_out:
            continue
        one, other = mine.get(name), value
        assert type(one) is type(other), name
        one, other = getattr(one, "tensor", one), getattr(other, "tensor", other)
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


MASK = rectangle(3, 10, 30, 45) - rectangle(10, 20, 12, 22)


def encoded(runs: list[int]) -> bytes:
    """Runs, right or wrong, as pycocotools compresses them."""
    rle = {"size": [HEIGHT, WIDTH], "counts": runs}
    return mask_utils.frPyObjects(rle, HEIGHT, WIDTH)["counts"]


def rle(counts: Any, size: Sequence[int] = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


PIXELS = HEIGHT * WIDTH


def rotated(path: Path, folder: Path) -> Path:
    """The same picture stored on its side, with the EXIF orientation that turns it back."""
    exif = Image.Exif()
    exif[274] = 6
    target = folder / "rotated.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(target, exif=exif)
    return target
