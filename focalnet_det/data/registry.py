"""Data sets by name: the generated one, and any COCO-format file."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .io.coco_files import CocoFile, read_coco
from .io.image_files import IMAGE_REMEDIES, check_image_files
from .io.issues import Faults
from .io.keypoints import flip_pairs
from .issue_policies import report_issues
from .shapes.generate import default_root

logger = logging.getLogger("focalnet_det")

Record = dict[str, Any]

# Evaluators, pictures and tables read these names, so they are worth more than an index.
SHAPES_SPLITS = {
    "shapes_train": ("images/train", "annotations/instances_train.json"),
    "shapes_val": ("images/val", "annotations/instances_val.json"),
}
COCO_SETS = (
    "coco_2017_train",
    "coco_2017_val",
    "coco_2017_test-dev",
    "keypoints_coco_2017_train",
    "keypoints_coco_2017_val",
)
ANNOTATION_KEYS = ("iscrowd", "bbox", "segmentation", "keypoints")


def register_shapes() -> None:
    """Register ``shapes_train`` and ``shapes_val``; see datasets/make_shapes.py."""
    root = default_root()
    for name, (images, annotations) in SHAPES_SPLITS.items():
        if name not in DatasetCatalog.list():
            register_coco_later(name, root / annotations, root / images)


def register_coco() -> None:
    """Register COCO's instances and keypoints under Detectron2's names, with checks of the files.

    Folders and colors are those of Detectron2's registration.
    """
    for name in COCO_SETS:
        metadata = MetadataCatalog.get(name).as_dict()
        del metadata["name"]
        register_coco_later(
            name,
            metadata.pop("json_file"),
            metadata.pop("image_root"),
            {k: v for k, v in metadata.items() if k != "evaluator_type"},
            evaluation="test" in name,
        )


def replace_registered(name: str, records: Callable[[], list[Record]]) -> None:
    """Register the records of a data set under a name, replacing what had that name."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, records)


def register_coco_later(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    evaluation: bool = False,
) -> None:
    """Register a COCO file that is read and checked when its records are asked for.

    Args:
        metadata: of the data set; what the file says of its classes is added when it is read.
        evaluation: see ``read_coco``.
    """

    def records() -> list[Record]:
        file = read_coco(json_file, image_root, evaluation=evaluation)
        # Metadata refuses other values than before, which a file written anew may have.
        vars(MetadataCatalog.get(name)).update(file_metadata(file))
        return coco_records(file, image_root)

    replace_registered(name, records)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        **(metadata or {}),
    )


def register_coco_json(
    name: str, json_file: str | Path, image_root: str | Path, *, evaluation: bool = False
) -> list[str]:
    """Check a COCO-format file and its images, and register it under a name.

    What had that name is replaced.

    Args:
        name: of the data set in configs.
        json_file: COCO instances or keypoints, any category ids.
        image_root: folder of the images that the file names.
        evaluation: hold it to what an evaluation needs; see ``read_coco``.
    Returns: class names, in order of category id.
    Raises: ValueError if a path does not exist, or with all faults of the file and its images.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    if not json_file.exists():
        raise ValueError(f"No such annotation file: {json_file}.")
    if not image_root.is_dir():
        raise ValueError(f"No such image folder: {image_root}.")
    file = read_coco(json_file, image_root, evaluation=evaluation)
    check_images(json_file, coco_records(file, image_root), evaluation=evaluation)
    metadata = file_metadata(file)
    register_coco_later(name, json_file, image_root, metadata, evaluation=evaluation)
    report_issues(json_file, file.issues, evaluation=evaluation)
    return [str(category["name"]) for category in file.categories]


def check_images(subject: object, records: list[Record], *, evaluation: bool) -> Counter[str]:
    """Check that the images of records are there, and open a sample.

    Args:
        subject: file that names the images, for the message.
    Returns: problems of ``ISSUE_POLICIES`` in the sample, which are also logged.
    Raises: ValueError with all faults.
    """
    faults = Faults(f"The images of {subject}", IMAGE_REMEDIES)
    issues = check_image_files(records, faults, evaluation=evaluation)
    faults.stop()
    report_issues(f"{subject}, a sample of its images", issues, evaluation=evaluation)
    return issues


def file_metadata(file: CocoFile) -> Record:
    """Return the metadata that Detectron2 and the loaders want of a COCO file."""
    objects = {row["image_id"] for row in file.annotations if not row.get("iscrowd")}
    return {
        "thing_classes": [str(category["name"]) for category in file.categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: k for k, c in enumerate(file.categories)},
        "file_issues": dict(file.settled),
        "num_annotated_images": len(objects),
        **keypoint_metadata(file.keypoint_names),
    }


def keypoint_metadata(names: list[str]) -> Record:
    """Return the names of keypoints, and which change places in a mirrored image."""
    if not names:
        return {}
    pairs, alone = flip_pairs(names)
    if alone:
        logger.warning(
            "Keypoints %s name a side, and no keypoint names the other one: in mirrored images "
            "they keep their names.",
            ", ".join(alone),
        )
    return {"keypoint_names": list(names), "keypoint_flip_map": pairs}


def coco_records(file: CocoFile, image_root: str | Path) -> list[Record]:
    """Return the records of a COCO file in Detectron2's format, in order of image id.

    Keypoints are moved by half a pixel: COCO numbers pixels, Detectron2 measures from the corner.
    """
    classes = {category["id"]: k for k, category in enumerate(file.categories)}
    by_image = file.by_image()
    records = []
    for image_id in sorted(file.images):
        image = file.images[image_id]
        annotations = [_annotation(row, classes) for row in by_image[image_id]]
        record: Record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image_id,
            **{side: image[side] for side in ("height", "width") if side in image},
        }
        records.append({**record, "annotations": annotations} if file.has_annotations else record)
    return records


def _annotation(row: Record, classes: Mapping[int, int]) -> Record:
    found = {key: row[key] for key in ANNOTATION_KEYS if row.get(key) is not None}
    found |= {"category_id": classes[row["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
    if points := found.pop("keypoints", None):
        found["keypoints"] = [v if k % 3 == 2 else v + 0.5 for k, v in enumerate(points)]
    return found
