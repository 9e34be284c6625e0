"""Register datasets by name: the generated one, COCO's, and any file in COCO format."""

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
from .io.issues import ValidationErrors
from .io.keypoints import flip_pairs
from .issue_policies import report_issues
from .shapes.generate import default_root

logger = logging.getLogger("focalnet_det")

Record = dict[str, Any]

# Paths relative to the root: (image folder, annotation file).
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
    """Register ``shapes_train`` and ``shapes_val``, which datasets/make_shapes.py generates."""
    root = default_root()
    for name, (images, annotations) in SHAPES_SPLITS.items():
        if name not in DatasetCatalog.list():
            register_coco_lazily(name, root / annotations, root / images)


def register_coco() -> None:
    """Replace Detectron2's COCO instance and keypoint datasets by ones whose files are checked.

    Names, folders and colors are unchanged.
    """
    for name in COCO_SETS:
        metadata = MetadataCatalog.get(name).as_dict()
        del metadata["name"]
        register_coco_lazily(
            name,
            metadata.pop("json_file"),
            metadata.pop("image_root"),
            {k: v for k, v in metadata.items() if k != "evaluator_type"},
            evaluation="test" in name,
        )


def register_or_replace(name: str, records: Callable[[], list[Record]]) -> None:
    """Register a dataset, replacing any dataset of the same name.

    Args:
        name: name in Detectron2's catalogs.
        records: function that loads the records in Detectron2's format.
    """
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, records)


def register_coco_lazily(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    evaluation: bool = False,
) -> None:
    """Register a COCO file that is read and checked when its records are first requested.

    Args:
        name: name in Detectron2's catalogs; an existing dataset of this name is replaced.
        json_file: COCO instances or keypoints.
        image_root: folder that ``file_name`` is relative to.
        metadata: metadata of the dataset; classes are added when the file is read.
        evaluation: see ``read_coco``.
    """

    def records() -> list[Record]:
        file = read_coco(json_file, image_root, evaluation=evaluation)
        # `Metadata.set` rejects changed values, but the file may have been rewritten since.
        vars(MetadataCatalog.get(name)).update(file_metadata(file))
        return coco_records(file, image_root)

    register_or_replace(name, records)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        **(metadata or {}),
    )


def register_coco_json(
    name: str, json_file: str | Path, image_root: str | Path, *, evaluation: bool = False
) -> list[str]:
    """Check a COCO file and its images, and register it.

    Args:
        name: name in Detectron2's catalogs; an existing dataset of this name is replaced.
        json_file: COCO instances or keypoints, with any category ids.
        image_root: folder that ``file_name`` is relative to.
        evaluation: apply the stricter rules of evaluation; see ``read_coco``.
    Returns: class names, in order of category id.
    Raises: ValueError if a path does not exist, or with all errors of the file and its images.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    if not json_file.exists():
        raise ValueError(f"Annotation file {json_file} does not exist.")
    if not image_root.is_dir():
        raise ValueError(f"Image folder {image_root} does not exist.")
    file = read_coco(json_file, image_root, evaluation=evaluation)
    check_images(json_file, coco_records(file, image_root), evaluation=evaluation)
    metadata = file_metadata(file)
    register_coco_lazily(name, json_file, image_root, metadata, evaluation=evaluation)
    report_issues(json_file, file.issues, evaluation=evaluation)
    return [str(category["name"]) for category in file.categories]


def check_images(subject: object, records: list[Record], *, evaluation: bool) -> Counter[str]:
    """Check that the images of records exist, and open a sample of them.

    Args:
        subject: dataset or annotation file that messages begin with.
        records: in Detectron2's format.
        evaluation: treat every unusable image as an error.
    Returns: {issue of ``ISSUE_POLICIES``: count} of the sample; they are also logged.
    Raises: ValueError with all errors.
    """
    errors = ValidationErrors(f"The images of {subject}", IMAGE_REMEDIES)
    issues = check_image_files(records, errors, evaluation=evaluation)
    errors.raise_if_any()
    report_issues(f"{subject}, a sample of its images", issues, evaluation=evaluation)
    return issues


def file_metadata(file: CocoFile) -> Record:
    """Return the metadata of a COCO file for Detectron2 and the data loaders."""
    annotated = {row["image_id"] for row in file.annotations if not row.get("iscrowd")}
    return {
        "thing_classes": [str(category["name"]) for category in file.categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: k for k, c in enumerate(file.categories)},
        "file_issues": dict(file.settled),
        "num_annotated_images": len(annotated),
        **keypoint_metadata(file.keypoint_names),
    }


def keypoint_metadata(names: list[str]) -> Record:
    """Return the keypoint names, and the pairs that are swapped by a horizontal flip."""
    if not names:
        return {}
    pairs, unpaired = flip_pairs(names)
    if unpaired:
        logger.warning(
            "Keypoints %s have a left or right name but no counterpart. They are not swapped in "
            "flipped images.",
            ", ".join(unpaired),
        )
    return {"keypoint_names": list(names), "keypoint_flip_map": pairs}


def coco_records(file: CocoFile, image_root: str | Path) -> list[Record]:
    """Return the records of a COCO file in Detectron2's format, in order of image id.

    Keypoints are shifted by half a pixel: COCO's are pixel indices, Detectron2's are coordinates
    measured from the image corner.
    Source: facebookresearch/detectron2:detectron2/data/datasets/coco.py (load_coco_json).
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
    annotation = {key: row[key] for key in ANNOTATION_KEYS if row.get(key) is not None}
    annotation |= {"category_id": classes[row["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
    if points := annotation.pop("keypoints", None):
        annotation["keypoints"] = [v if k % 3 == 2 else v + 0.5 for k, v in enumerate(points)]
    return annotation
