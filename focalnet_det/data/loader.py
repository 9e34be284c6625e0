"""Build data loaders for training and evaluation on top of Detectron2's."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.utils import comm

from .augmentation import scaled
from .instances.copy_paste import CopyPaste
from .instances.mappers import InstanceMapper, ViewMapper
from .stream import build_stream_loader, fingerprint
from .workers import protect_workers

logger = logging.getLogger("focalnet_det")


class TrainLoader:
    """Endless iterable of training batches with a known epoch length.

    Args:
        open_at: (seed, iteration) -> batches of this process, starting at that iteration.
        num_images: images in the training set, after filtering images without annotations.
        batch_size: images per iteration, summed over all processes.
        fingerprint: hash of the training set, see
            :func:`~focalnet_det.data.stream.fingerprint`.
        image_format: channel order of the images, "RGB" or "BGR".

    Attributes:
        seed, start: arguments of ``open_at``; set them before the first iteration.
        on_first_batch: called with the very first batch of the stream, before it is returned; None
            for nothing.
        file_issues: {issue: count} of the issues repaired while reading the annotation files.
    """

    def __init__(
        self,
        open_at: Callable[[int, int], Iterable[list[dict[str, Any]]]],
        *,
        num_images: int,
        batch_size: int,
        fingerprint: str = "",
        image_format: str = "RGB",
    ) -> None:
        self.open_at = open_at
        self.fingerprint = fingerprint
        self.image_format = image_format
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = 0
        self.start = 0
        self.on_first_batch: Callable[[list[dict[str, Any]]], None] | None = None
        self.file_issues: Counter[str] = Counter()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # Opened lazily: trainers create the iterator before a resumed run sets `start`.
        for number, batch in enumerate(self.open_at(self.seed, self.start), self.start):
            if number == 0 and self.on_first_batch is not None:
                self.on_first_batch(batch)
            yield batch

    @property
    def iterations_per_epoch(self) -> int:
        """Number of iterations that process as many images as the training set has."""
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
    copy_paste: float = 0.0,
) -> TrainLoader:
    """Build a loader of shuffled, augmented training batches.

    Args:
        datasets: registered names.
        augmentations: applied in order.
        batch_size: images per iteration, summed over all processes.
        num_workers: loader workers per process.
        masks: load instance masks as bitmaps, whether annotated as polygons or RLE.
        keypoints: load keypoints, and filter images without any.
        image_format: channel order, "RGB" or "BGR".
        filter_empty: filter images without annotations other than crowds.
        aspect_ratio_grouping: batch portrait and landscape images separately, to save padding.
        copy_paste: probability that objects of another image are pasted onto an image, see
            :class:`~focalnet_det.data.instances.copy_paste.CopyPaste`; requires masks.
    Raises: ValueError if the batch cannot be split evenly over the processes, masks are requested
        but not annotated, or ``copy_paste`` is combined with other options than masks.
    """
    if copy_paste and (keypoints or not masks):
        raise ValueError("copy_paste requires masks=True and keypoints=False.")
    names = [datasets] if isinstance(datasets, str) else list(datasets)
    records = dataset_records(names, filter_empty=filter_empty, min_keypoints=int(keypoints))
    if masks:
        check_masks(", ".join(names), records, evaluation=False)
    mapper = InstanceMapper(
        is_train=True,
        augmentations=augmentations,
        image_format=image_format,
        masks=masks,
        keypoints=keypoints,
        keypoint_hflip_indices=create_keypoint_hflip_indices(names) if keypoints else None,
        recompute_boxes=masks,
    )
    open_at = _stream_opener(
        records,
        mapper,
        batch_size=batch_size,
        num_workers=num_workers,
        aspect_ratio_grouping=aspect_ratio_grouping,
        mix=CopyPaste(copy_paste) if copy_paste else None,
    )
    loader = _train_loader(open_at, names, records, batch_size)
    loader.image_format = image_format
    return loader


def _train_loader(
    open_at: Callable[[int, int], Iterable[list[dict[str, Any]]]],
    names: Sequence[str],
    records: Sequence[dict[str, Any]],
    batch_size: int,
) -> TrainLoader:
    """Describe the batches of ``open_at``, with the issues that the files of the sets have."""
    loader = TrainLoader(
        open_at, num_images=len(records), batch_size=batch_size, fingerprint=fingerprint(records)
    )
    for name in names:
        loader.file_issues.update(MetadataCatalog.get(name).get("file_issues", {}))
    return loader


def _stream_opener(
    records: Sequence[dict[str, Any]],
    mapper: InstanceMapper,
    *,
    batch_size: int,
    num_workers: int,
    aspect_ratio_grouping: bool,
    mix: CopyPaste | None,
) -> Callable[[int, int], Iterable[list[dict[str, Any]]]]:
    """Return ``open_at`` of a :class:`TrainLoader` for this process."""
    world_size = comm.get_world_size()
    if batch_size % world_size:
        raise ValueError(
            f"A batch of {batch_size} images cannot be split evenly over {world_size} processes."
        )
    groups = [
        int(aspect_ratio_grouping and record.get("width", 0) > record.get("height", 0))
        for record in records
    ]

    def open_at(seed: int, start: int) -> Iterable[list[dict[str, Any]]]:
        return build_stream_loader(
            records,
            mapper,
            groups=groups,
            batch_size=batch_size // world_size,
            num_workers=num_workers,
            seed=seed,
            start=start,
            rank=comm.get_rank(),
            world_size=world_size,
            mix=mix,
        )

    return open_at


def check_masks(subject: str, records: Sequence[dict[str, Any]], *, evaluation: bool) -> None:
    """Check that all objects (evaluation) or at least half of them (training) have masks.

    Records with panoptic segments instead of annotations always do.

    Args:
        subject: dataset or file that messages begin with.
        records: in Detectron2's format.
        evaluation: require a mask of every object.
    Raises: ValueError with the number of objects without a mask.
    """
    rows = [row for record in records for row in record.get("annotations", ())]
    if not evaluation:
        rows = [row for row in rows if not row.get("iscrowd")]
    without = sum(not has_mask(row) for row in rows)
    if rows and without == len(rows):
        raise ValueError(f"No annotation of {subject} has a mask. Train a box detector instead.")
    if without and (evaluation or 2 * without > len(rows)):
        raise ValueError(
            f"{without} of {len(rows)} annotations of {subject} have no mask. Add `segmentation`, "
            "or train and evaluate a box detector."
        )
    if without:
        logger.warning(
            "%s: %d of %d annotations have no mask and are ignored. Their objects count as "
            "background.",
            subject,
            without,
            len(rows),
        )


def has_mask(row: dict[str, Any]) -> bool:
    """Return whether an annotation has a mask in any format."""
    mask = row.get("segmentation")
    return mask is not None and not (isinstance(mask, list | str) and not mask)


def dataset_records(
    names: Sequence[str], *, filter_empty: bool, min_keypoints: int = 0
) -> list[dict[str, Any]]:
    """Load the records of registered datasets.

    Args:
        names: registered names.
        filter_empty: filter images without annotations other than crowds.
        min_keypoints: filter images with fewer visible keypoints.
    Returns: records in Detectron2's format.
    Raises: FileNotFoundError that says where the data should be; ValueError if no image is usable,
        class names differ, or keypoints are requested but not defined by the dataset.
    """
    if min_keypoints:
        check_keypoints(names)
    try:
        loaded = [DatasetCatalog.get(name) for name in names]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Dataset {', '.join(names)}: {error.filename} does not exist. Put the data there, or "
            "set DETECTRON2_DATASETS to the folder that contains it (see datasets/README.md)."
        ) from error
    records = filter_records(
        list(chain.from_iterable(loaded)),
        names,
        filter_empty=filter_empty,
        min_keypoints=min_keypoints,
    )
    classes = shared_class_names(names)
    if classes and "annotations" in records[0]:
        print_instances_class_histogram(records, classes)
    return records


def shared_class_names(names: Sequence[str]) -> list[str] | None:
    """Return the thing classes of datasets, None if they have none.

    Raises: ValueError if the datasets disagree.
    """
    classes = [MetadataCatalog.get(name).get("thing_classes") for name in names]
    for name, thing_classes in zip(names, classes, strict=True):
        if thing_classes != classes[0]:
            raise ValueError(f"Datasets {names[0]} and {name} have different classes.")
    return classes[0]


def filter_records(
    records: list[dict[str, Any]],
    names: Sequence[str],
    *,
    filter_empty: bool,
    min_keypoints: int = 0,
) -> list[dict[str, Any]]:
    """Filter records without objects, or with too few keypoints.

    Raises: ValueError if no record remains.
    """
    subject = f"Dataset {', '.join(names)}"
    if not records:
        raise ValueError(f"{subject} contains no images.")
    if "annotations" not in records[0]:
        return records
    usable = filter_images_with_only_crowd_annotations(records) if filter_empty else records
    if not usable:
        raise ValueError(
            f"{subject}: none of its {len(records)} images has an annotation other than crowds. "
            "Check image_id and iscrowd of the annotations."
        )
    if min_keypoints:
        usable = filter_images_with_few_keypoints(usable, min_keypoints)
    if not usable:
        raise ValueError(f"{subject}: no object in its {len(records)} images has a keypoint.")
    return usable


def check_keypoints(names: Sequence[str]) -> None:
    """Check that datasets define keypoints.

    Raises: ValueError if one does not.
    """
    for name in names:
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise ValueError(
                f"Dataset {name} defines no keypoints. Its category needs a `keypoints` list of "
                "names, like COCO's person category."
            )


def build_test_loader(
    *,
    dataset: str,
    augmentations: Sequence[T.Augmentation],
    num_workers: int,
    image_format: str = "RGB",
    scales: Sequence[float] = (),
    flip: bool = False,
    views: Sequence[Sequence[T.Augmentation]] = (),
) -> Any:
    """Build a loader that yields each image of a dataset once, in order, one per batch.

    Args:
        dataset: registered name.
        augmentations: applied in order.
        num_workers: loader workers per process.
        image_format: channel order, "RGB" or "BGR".
        scales: factors on the sizes of ``augmentations`` for test-time augmentation; () for 1.
        flip: also evaluate the mirrored image of each view (test-time augmentation).
        views: augmentations of each view, instead of ``augmentations`` at ``scales``.
    Raises: ValueError if both views and scales are given.
    """
    mapper = build_test_mapper(
        augmentations=augmentations,
        image_format=image_format,
        scales=scales,
        flip=flip,
        views=views,
    )
    return protect_workers(
        build_detection_test_loader(
            dataset_records([dataset], filter_empty=False), mapper=mapper, num_workers=num_workers
        )
    )


def build_test_mapper(
    *,
    augmentations: Sequence[T.Augmentation],
    image_format: str = "RGB",
    scales: Sequence[float] = (),
    flip: bool = False,
    views: Sequence[Sequence[T.Augmentation]] = (),
) -> InstanceMapper:
    """Build what turns a record of an image into the input of a model, in evaluation.

    Args: as in :func:`build_test_loader`.
    Raises: ValueError for both views and scales.
    """
    if views and scales:
        raise ValueError("Test-time augmentation takes either views or scales.")
    if not (scales or flip or views):
        return InstanceMapper(
            is_train=False, augmentations=augmentations, image_format=image_format
        )
    resizes = [list(view) for view in views]
    resizes = resizes or [scaled(augmentations, scale) for scale in scales or (1.0,)]
    mirrored = [[*resize, T.RandomFlip(prob=1.0)] for resize in resizes] if flip else []
    return ViewMapper(views=[*resizes, *mirrored], image_format=image_format)
