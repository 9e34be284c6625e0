"""Load COCO ground truth for evaluation, and check predictions against it."""

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
    """Ground truth of a COCO file.

    Attributes:
        path: annotation file.
        images: by id, with height and width if the file has them.
        annotations: by image id.
        category_records: COCO categories, in order of id.
        categories: id -> name, in order of id.
        instance_counts: category id -> instances, excluding crowds.
        has_annotations: False for test sets.
        without_mask: id of an annotation without segmentation, None if all have one.
        num_keypoints: per annotation.
        most_objects: maximum number of objects of one class per image.
    """

    path: Path
    images: Mapping[int, Record]
    annotations: Mapping[int, list[Record]]
    category_records: list[Record]
    categories: Mapping[int, str]
    instance_counts: Mapping[int, int]
    has_annotations: bool
    without_mask: int | None
    num_keypoints: int
    most_objects: int

    def known_image(self, image_id: Any) -> int:
        """Return the id of an image as int; raise ValueError if it is not in the file."""
        if image_id in self.images:
            return int(image_id)
        raise ValueError(
            f"Image id {image_id!r} is not in {self.path} ({len(self.images)} images). "
            "Evaluate on the same dataset that was loaded."
        )

    def check_labels(self, image_id: int, labels: Sequence[int]) -> None:
        """Raise ValueError if a predicted class does not exist."""
        for label in labels:
            if not 0 <= label < len(self.categories):
                raise ValueError(
                    f"A prediction of image {image_id} has class {label}, but {self.path} has "
                    f"{len(self.categories)} classes. Set the model's number of classes to that."
                )

    def check_has_masks(self) -> None:
        """Raise ValueError if an annotation has no mask."""
        if self.without_mask is not None:
            raise ValueError(
                f"Annotation {self.without_mask} in {self.path} has no segmentation, which mask AP "
                'requires. Use tasks=("bbox",).'
            )

    def check_masks(self, image_id: int, masks: Tensor) -> None:
        """Raise ValueError if predicted masks, (N, H, W), cannot be evaluated."""
        self.check_has_masks()
        image, size = self.images[image_id], tuple(masks.shape[1:])
        expected = (image.get("height"), image.get("width"))
        if len(masks) and size != expected and None not in expected:
            raise ValueError(
                f"Masks of image {image_id} are {size} (height, width), but {self.path} lists "
                f"{expected}. Resize predictions to the original image."
            )


def load_ground_truth(path: Path, image_root: Path | None) -> GroundTruth:
    """Load a COCO file with the validation of ``read_coco``.

    Raises: FileNotFoundError if it does not exist, DataError with all errors.
    """
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
    """Map class names to category ids, in order of the model's classes.

    Args:
        truth: ground truth.
        mapping: category id -> class of the model; None for the order of ids.
        names: class names; None for those of the file.
    Raises: ValueError if the arguments are inconsistent.
    """
    if mapping is None:
        mapping = {category: k for k, category in enumerate(truth.categories)}
    if unknown := sorted(set(mapping) ^ set(truth.categories)):
        raise ValueError(
            f"thing_dataset_id_to_contiguous_id and {truth.path} differ in category ids {unknown}."
        )
    if sorted(mapping.values()) != list(range(len(mapping))):
        raise ValueError("Contiguous ids must be 0, 1, ... without gaps or duplicates.")
    category_ids = sorted(mapping, key=lambda category: mapping[category])
    names = [truth.categories[c] for c in category_ids] if names is None else names
    if len(names) != len(category_ids) or len(set(names)) != len(names):
        raise ValueError(
            f"{truth.path} has {len(category_ids)} categories, so class_names must be as many "
            f"unique names, got {', '.join(names)}."
        )
    return dict(zip(names, category_ids, strict=True))
