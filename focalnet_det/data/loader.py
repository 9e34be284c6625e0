"""Data loaders over Detectron2's, with the few options that the recipes need."""

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
from .stream import fingerprint, open_stream
from .workers import protect_workers

logger = logging.getLogger("focalnet_det")


class TrainLoader:
    """An endless stream of training batches that knows how long an epoch is.

    Args:
        open_at: (seed, iteration) -> batches of this process from that iteration on.
        num_images: images in the training set, after those without annotations are left out.
        batch_size: images per iteration, over all processes.
        fingerprint: of the training set, see :func:`~focalnet_det.data.stream.fingerprint`.

    Attributes:
        seed, start: what the stream is opened with; set them before the first iteration.
        file_issues: problems that were settled when the annotation files were read, by name.
    """

    def __init__(
        self,
        open_at: Callable[[int, int], Iterable[list[dict[str, Any]]]],
        *,
        num_images: int,
        batch_size: int,
        fingerprint: str = "",
    ) -> None:
        self.open_at = open_at
        self.fingerprint = fingerprint
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = 0
        self.start = 0
        self.file_issues: Counter[str] = Counter()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # Opened at the first batch, not before: trainers ask for an iterator when they are built.
        yield from self.open_at(self.seed, self.start)

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
    copy_paste: float = 0.0,
) -> TrainLoader:
    """Shuffled, augmented training batches.

    Args:
        datasets: registered names.
        augmentations: applied in order.
        batch_size: images per iteration, over all processes.
        num_workers: loader processes per training process.
        masks: load instance masks, as bitmaps: polygons and RLE alike, cropped exactly.
        keypoints: load keypoints, and leave out images that have none.
        image_format: channel order, "RGB" or "BGR".
        filter_empty: leave out images that have no annotation but crowds.
        aspect_ratio_grouping: batch upright images with upright ones, to save padding.
        copy_paste: probability that objects of another image are pasted onto one, see
            :class:`~focalnet_det.data.instances.copy_paste.CopyPaste`; needs masks.
    Raises: ValueError if the processes cannot share the batch evenly, or masks are asked for and
        there are none.
    """
    if copy_paste and (keypoints or not masks):
        raise ValueError("copy_paste needs masks=True and keypoints=False.")
    names = [datasets] if isinstance(datasets, str) else list(datasets)
    dicts = dataset_records(names, filter_empty=filter_empty, min_keypoints=int(keypoints))
    if masks:
        check_masks(", ".join(names), dicts, evaluation=False)
    mapper = InstanceMapper(
        is_train=True,
        augmentations=augmentations,
        image_format=image_format,
        masks=masks,
        keypoints=keypoints,
        keypoint_hflip_indices=create_keypoint_hflip_indices(names) if keypoints else None,
        recompute_boxes=masks,
    )
    processes = comm.get_world_size()
    if batch_size % processes:
        raise ValueError(
            f"A batch of {batch_size} images cannot be split over {processes} processes."
        )
    wide = [int(aspect_ratio_grouping and r.get("width", 0) > r.get("height", 0)) for r in dicts]

    def open_at(seed: int, start: int) -> Iterable[list[dict[str, Any]]]:
        return open_stream(
            dicts,
            mapper,
            groups=wide,
            batch_size=batch_size // processes,
            num_workers=num_workers,
            seed=seed,
            start=start,
            rank=comm.get_rank(),
            world_size=processes,
            mix=CopyPaste(copy_paste) if copy_paste else None,
        )

    loader = TrainLoader(
        open_at, num_images=len(dicts), batch_size=batch_size, fingerprint=fingerprint(dicts)
    )
    for name in names:
        loader.file_issues.update(MetadataCatalog.get(name).get("file_issues", {}))
    return loader


def check_masks(subject: str, records: Sequence[dict[str, Any]], *, evaluation: bool) -> None:
    """Check that objects have masks: all in an evaluation, more than half in a training.

    Records with panoptic segments in place of annotations have them.

    Raises: ValueError that says how many lack one.
    """
    rows = [row for record in records for row in record.get("annotations", ())]
    if not evaluation:
        rows = [row for row in rows if not row.get("iscrowd")]
    without = sum(not has_mask(row) for row in rows)
    if rows and without == len(rows):
        raise ValueError(f"No annotation of {subject} has a mask: train a box detector.")
    if without and (evaluation or 2 * without > len(rows)):
        raise ValueError(
            f"{without} of {len(rows)} annotations of {subject} have no mask: add `segmentation`, "
            "or train and evaluate a box detector."
        )
    if without:
        logger.warning(
            "%s: %d of %d annotations have no mask and are left out: their objects count as "
            "background.",
            subject,
            without,
            len(rows),
        )


def has_mask(row: dict[str, Any]) -> bool:
    """Return whether an annotation has a mask of any kind."""
    mask = row.get("segmentation")
    return mask is not None and not (isinstance(mask, list | str) and not mask)


def dataset_records(
    names: Sequence[str], *, filter_empty: bool, min_keypoints: int = 0
) -> list[dict[str, Any]]:
    """Records of registered data sets.

    Raises: FileNotFoundError that says where the data should be; ValueError if no image can be
        used, or the data set names no keypoints and they are asked for.
    """
    if min_keypoints:
        check_keypoints(names)
    try:
        sets = [DatasetCatalog.get(name) for name in names]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Data set {', '.join(names)}: {error.filename} does not exist. Put the data there, or "
            "set DETECTRON2_DATASETS to the folder that holds it; see datasets/README.md."
        ) from error
    records = usable_records(
        list(chain.from_iterable(sets)),
        names,
        filter_empty=filter_empty,
        min_keypoints=min_keypoints,
    )
    classes = common_classes(names)
    if classes and "annotations" in records[0]:
        print_instances_class_histogram(records, classes)
    return records


def common_classes(names: Sequence[str]) -> list[str] | None:
    """Return the class names of the things of data sets, None if they have none.

    Raises: ValueError if they are not the same in all.
    """
    classes = [MetadataCatalog.get(name).get("thing_classes") for name in names]
    for name, found in zip(names, classes, strict=True):
        if found != classes[0]:
            raise ValueError(f"Data sets {names[0]} and {name} do not have the same classes.")
    return classes[0]


def usable_records(
    records: list[dict[str, Any]],
    names: Sequence[str],
    *,
    filter_empty: bool,
    min_keypoints: int = 0,
) -> list[dict[str, Any]]:
    """Leave out records without objects, or without enough keypoints.

    Raises: ValueError if there is no record, or none that can be used.
    """
    subject = f"Data set {', '.join(names)}"
    if not records:
        raise ValueError(f"{subject} has no image.")
    if "annotations" not in records[0]:
        return records
    kept = filter_images_with_only_crowd_annotations(records) if filter_empty else records
    if not kept:
        raise ValueError(
            f"{subject}: none of its {len(records)} images has an annotation that is not a crowd. "
            "There is nothing to learn: check image_id and iscrowd of the annotations."
        )
    if min_keypoints:
        kept = filter_images_with_few_keypoints(kept, min_keypoints)
    if not kept:
        raise ValueError(f"{subject}: no object of its {len(records)} images has a keypoint.")
    return kept


def check_keypoints(names: Sequence[str]) -> None:
    """Raises: ValueError if a data set names no keypoints."""
    for name in names:
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise ValueError(
                f"Data set {name} names no keypoints: its category needs a list of `keypoints`, as "
                "COCO's person has."
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
    """Every image of a registered data set once, in order, one per batch.

    Args:
        scales: of test-time augmentation, factors on the sizes of ``augmentations``; () for 1.
        flip: with test-time augmentation, also mirror each view.
        views: of test-time augmentation, in place of ``augmentations`` at ``scales``.
    Raises: ValueError for both views and scales.
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
