"""A few tiny images with boxes, panoptic segments and label maps, as a user's own files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CLASSES = ("car", "bus", "zebra")
THINGS = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
STUFF = [{"id": 10, "name": "sky", "isthing": 0}, {"id": 11, "name": "sea", "isthing": 0}]


def coco(images: int) -> dict[str, Any]:
    """Four images of 64 x 64 px with one object each."""
    rows = [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(images)]
    box = {"bbox": [8, 8, 24, 16], "area": 384, "iscrowd": 0}
    outline = [[8, 8, 32, 8, 32, 24, 8, 24]]
    annotations = [
        {**box, "id": i + 1, "image_id": i, "category_id": 1 + i % 3, "segmentation": outline}
        for i in range(images)
    ]
    return {"images": rows, "annotations": annotations, "categories": THINGS}


def panoptic(images: int) -> dict[str, Any]:
    """The same images, the object as segment 1 and the sky around it as segment 2."""
    segments = [
        {"id": 1, "category_id": 1, "area": 384, "bbox": [8, 8, 24, 16], "iscrowd": 0},
        {"id": 2, "category_id": 10, "area": 3712, "bbox": [0, 0, 64, 64], "iscrowd": 0},
    ]
    names = [{"image_id": i, "file_name": f"{i}.png"} for i in range(images)]
    return {
        "images": coco(images)["images"],
        "annotations": [{**name, "segments_info": segments} for name in names],
        "categories": [*({**thing, "isthing": 1} for thing in THINGS), *STUFF],
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``{train,val}``, ``{train,val}_labels``, their JSONs and class list."""
    root = tmp_path_factory.mktemp("own")
    for split, count in (("train", 4), ("val", 2)):
        for folder in (split, f"{split}_labels", f"panoptic_{split}"):
            (root / folder).mkdir()
        labels = np.zeros((64, 64), dtype=np.uint8)
        segments = np.full((64, 64, 3), (2, 0, 0), dtype=np.uint8)
        labels[8:24, 8:32], segments[8:24, 8:32] = 1, (1, 0, 0)
        pixels = np.repeat(labels[..., None] * 200, 3, 2)
        for i in range(count):
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            Image.fromarray(labels).save(root / f"{split}_labels/{i}.png")
            Image.fromarray(segments).save(root / f"panoptic_{split}/{i}.png")
        (root / f"{split}.json").write_text(json.dumps(coco(count)))
        (root / f"panoptic_{split}.json").write_text(json.dumps(panoptic(count)))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root
