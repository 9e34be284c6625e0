"""Data sets by name: the generated one, and any COCO-format file."""

import json
from pathlib import Path
from typing import Any, cast

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .mappers import problems_of_file
from .shapes import default_root

# Evaluators, pictures and tables read these names, so they are worth more than an index.
SHAPES_SPLITS = {
    "shapes_train": ("images/train", "annotations/instances_train.json"),
    "shapes_val": ("images/val", "annotations/instances_val.json"),
}


def register_shapes() -> None:
    """Registers ``shapes_train`` and ``shapes_val``; see datasets/make_shapes.py."""
    root = default_root()
    for name, (images, annotations) in SHAPES_SPLITS.items():
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, str(root / annotations), str(root / images))


def register_coco_json(name: str, json_file: str | Path, image_root: str | Path) -> list[str]:
    """Registers a COCO-format file under a name, replacing what had that name.

    Args:
        name: of the data set in configs.
        json_file: COCO instances, any category ids.
        image_root: folder of the images that the file names.
    Returns: class names, in order of category id.
    Raises: ValueError if a path does not exist or the file is not COCO instances.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    if not json_file.is_file():
        raise ValueError(f"No such annotation file: {json_file}.")
    if not image_root.is_dir():
        raise ValueError(f"No such image folder: {image_root}.")
    content = read_coco_file(json_file)
    classes = class_names(json_file, content)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, str(json_file), str(image_root))
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        file_issues=problems_of_file(content),
        num_annotated_images=len({annotation["image_id"] for annotation in content["annotations"]}),
        **keypoint_metadata(content),
    )
    return classes


def keypoint_metadata(content: dict[str, Any]) -> dict[str, Any]:
    """What Detectron2 wants to know of a COCO file's keypoints; nothing if it has none.

    In a mirrored image, ``left_x`` and ``right_x`` change places.
    """
    names = next((c["keypoints"] for c in content["categories"] if c.get("keypoints")), None)
    if names is None:
        return {}
    pairs = [(n, n.replace("left", "right")) for n in names if "left" in n]
    flips = [(left, right) for left, right in pairs if right in names]
    return {"keypoint_names": list(names), "keypoint_flip_map": flips}


def read_coco_file(json_file: Path) -> dict[str, Any]:
    """Content of a COCO file.

    Raises: ValueError if the file is not JSON or lacks what COCO instances have.
    """
    try:
        content = json.loads(json_file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{json_file} is not a JSON file: {error}.") from error
    missing = {"images", "annotations", "categories"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        raise ValueError(
            f"{json_file} is not in COCO format: it lacks {', '.join(sorted(missing))}."
        )
    return cast(dict[str, Any], content)


def class_names(json_file: Path, content: dict[str, Any]) -> list[str]:
    """Class names of a COCO file in order of category id.

    Raises: ValueError if there are none.
    """
    categories = content["categories"]
    if not categories:
        raise ValueError(f"{json_file} lists no categories.")
    if not all({"id", "name"} <= set(category) for category in categories):
        raise ValueError(f"{json_file} has a category without id or name.")
    categories = sorted(categories, key=lambda category: category["id"])
    return [str(category["name"]) for category in categories]
