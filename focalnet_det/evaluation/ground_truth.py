"""COCO ground truth of an evaluation, and checks of predictions against it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.io.coco_files import read_coco

Record = dict[str, Any]


@dataclass(frozen=True)
class GroundTruth:
    """Hold ground truth by image, with what is needed to check predictions."""

    path: Path
    images: Mapping[int, Record]  # by id, with height and width where the file has them
    annotations: Mapping[int, list[Record]]  # by image id
    category_records: list[Record]
    categories: Mapping[int, str]  # in order of id
    instance_counts: Mapping[int, int]
    has_annotations: bool
    without_mask: int | None  # id of one annotation without segmentation
    num_keypoints: int  # of an annotation
    most_objects: int  # of one class in an image

    def known_image(self, image_id: Any) -> int:
        if image_id in self.images:
            return int(image_id)
        raise ValueError(
            f"Image id {image_id!r} is not in {self.path} ({len(self.images)} images): "
            "evaluate on the dataset that was loaded."
        )

    def check_labels(self, image_id: int, labels: Sequence[int]) -> None:
        for label in labels:
            if not 0 <= label < len(self.categories):
                raise ValueError(
                    f"Image {image_id} has a prediction of class {label}, but {self.path} has "
                    f"{len(self.categories)} classes: set the model's number of classes to that."
                )

    def check_has_masks(self) -> None:
        if self.without_mask is not None:
            raise ValueError(
                f"Annotation {self.without_mask} in {self.path} has no segmentation: mask AP "
                'cannot be measured, use tasks=("bbox",).'
            )

    def check_masks(self, image_id: int, masks: Tensor) -> None:
        self.check_has_masks()
        image, size = self.images[image_id], tuple(masks.shape[1:])
        expected = (image.get("height"), image.get("width"))
        if len(masks) and size != expected and None not in expected:
            raise ValueError(
                f"Masks of image {image_id} are {size} (height, width), but {self.path} says "
                f"{expected}: resize predictions to the original image."
            )


def load_ground_truth(path: Path, image_root: Path | None) -> GroundTruth:
    """Read COCO annotations as the training does; DataError with all faults of the file."""
    file = read_coco(path, image_root, evaluation=True)
    return GroundTruth(
        path=path,
        images=file.images,
        annotations=file.by_image(),
        category_records=file.categories,
        categories={c["id"]: c["name"] for c in file.categories},
        instance_counts=Counter(a["category_id"] for a in file.annotations if not a.get("iscrowd")),
        has_annotations=file.has_annotations,
        without_mask=next((a["id"] for a in file.annotations if not a.get("segmentation")), None),
        num_keypoints=len(file.keypoint_names),
        most_objects=max(
            Counter(
                (a["image_id"], a["category_id"]) for a in file.annotations if not a.get("iscrowd")
            ).values(),
            default=0,
        ),
    )


def model_classes(
    truth: GroundTruth, mapping: Mapping[int, int] | None, names: Sequence[str] | None
) -> dict[str, int]:
    """Return class name -> category id, in order of the classes that the model predicts."""
    if mapping is None:
        mapping = {category: k for k, category in enumerate(truth.categories)}
    if unknown := sorted(set(mapping) ^ set(truth.categories)):
        raise ValueError(
            f"thing_dataset_id_to_contiguous_id and {truth.path} differ in category ids {unknown}."
        )
    if sorted(mapping.values()) != list(range(len(mapping))):
        raise ValueError("Contiguous ids must be 0, 1, ... without gaps or repetitions.")
    category_ids = sorted(mapping, key=lambda category: mapping[category])
    names = [truth.categories[c] for c in category_ids] if names is None else names
    if len(names) != len(category_ids) or len(set(names)) != len(names):
        raise ValueError(
            f"{truth.path} has {len(category_ids)} categories: class_names must give a different "
            f"name for each, got {', '.join(names)}."
        )
    return dict(zip(names, category_ids, strict=True))
