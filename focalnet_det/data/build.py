"""Data loaders over Detectron2's, with the few options that the recipes need."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T


class TrainLoader:
    """An endless stream of training batches that knows how long an epoch is.

    Attributes:
        num_images: images in the training set, after those without annotations are left out.
        batch_size: images per iteration, over all processes.
    """

    def __init__(self, loader: Any, *, num_images: int, batch_size: int) -> None:
        self.loader = loader
        self.num_images = num_images
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return iter(self.loader)

    @property
    def iterations_per_epoch(self) -> int:
        """Iterations that show as many images as the training set has."""
        return max(1, math.ceil(self.num_images / self.batch_size))


def build_train_loader(
    *,
    datasets: str | Sequence[str],
    augmentations: Sequence[T.Augmentation],
    batch_size: int,
    num_workers: int,
    masks: bool = True,
    keypoints: bool = False,
    image_format: str = "RGB",
    filter_empty: bool = True,
    aspect_ratio_grouping: bool = True,
) -> TrainLoader:
    """Shuffled, augmented training batches.

    Args:
        datasets: registered names.
        augmentations: applied in order.
        batch_size: images per iteration, over all processes.
        num_workers: loader processes per training process.
        masks: load instance masks, as bitmaps: polygons and RLE alike, cropped exactly.
        keypoints: load keypoints.
        image_format: channel order, "RGB" or "BGR".
        filter_empty: leave out images that have no annotation but crowds.
        aspect_ratio_grouping: batch upright images with upright ones, to save padding.
    Raises: ValueError if no image is left.
    """
    names = [datasets] if isinstance(datasets, str) else list(datasets)
    dicts = dataset_records(names, filter_empty=filter_empty)
    mapper = DatasetMapper(
        is_train=True,
        augmentations=list(augmentations),
        image_format=image_format,
        use_instance_mask=masks,
        instance_mask_format="bitmask",
        use_keypoint=keypoints,
        recompute_boxes=masks,
    )
    loader = build_detection_train_loader(
        dicts,
        mapper=mapper,
        total_batch_size=batch_size,
        num_workers=num_workers,
        aspect_ratio_grouping=aspect_ratio_grouping,
    )
    return TrainLoader(loader, num_images=len(dicts), batch_size=batch_size)


def dataset_records(names: Sequence[str], *, filter_empty: bool) -> list[dict[str, Any]]:
    """Records of registered data sets.

    Raises: FileNotFoundError that says where the data should be.
    """
    try:
        return get_detection_dataset_dicts(list(names), filter_empty=filter_empty)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Data set {', '.join(names)}: {error.filename} does not exist. Put the data there, or "
            "set DETECTRON2_DATASETS to the folder that holds it; see datasets/README.md."
        ) from error


def build_test_loader(
    *,
    dataset: str,
    augmentations: Sequence[T.Augmentation],
    num_workers: int,
    image_format: str = "RGB",
) -> Any:
    """Every image of a registered data set once, in order, one per batch."""
    return build_detection_test_loader(
        dataset_records([dataset], filter_empty=False),
        mapper=DatasetMapper(
            is_train=False, augmentations=list(augmentations), image_format=image_format
        ),
        num_workers=num_workers,
    )
