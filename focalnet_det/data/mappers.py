"""From a record of a data set to what a model takes, whatever its image and labels are like."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from .labels import UnreadableLabelsError, read_labels
from .panoptic import segment_annotations
from .reading import UnreadableImageError, read_rgb, to_array
from .tally import (
    BOX_OUTSIDE,
    CROWD,
    EMPTY_BOX,
    EMPTY_MASK,
    LABEL_SIZE_DIFFERS,
    MALFORMED_BOX,
    MALFORMED_MASK,
    MALFORMED_PART,
    NO_ANNOTATION,
    NO_MASK,
    SIZE_DIFFERS,
    UNLISTED_IMAGE,
    UNREADABLE_IMAGE,
    UNREADABLE_LABELS,
)

DATA_ISSUES = "data_issues"
# Published coordinates have two decimals.
BOX_ROUNDING = 0.01
# Narrower boxes count as empty in Detectron2 too (filter_empty_instances).
SMALLEST_SIDE = 1e-5


class SkippedImage(Exception):
    """An image that training does without: draw another one.

    Attributes:
        problem: name of the row in ``POLICIES``.
        issues: {problem: 1}, for ``DataTally.add``.
    """

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(problem, detail)  # both, or it could not be pickled
        self.problem = problem
        self.issues = {problem: 1}

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class InstanceMapper(DatasetMapper):
    """Reads, augments and converts images with boxes, masks and keypoints.

    Gives what Detectron2's ``DatasetMapper`` gives where a record has no problem. Where it has, it
    does what ``POLICIES`` says, and ``data_issues`` of its result holds {problem: count}.

    An image without annotation has fields of length 0, masks included.
    """

    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        masks: bool = False,
        keypoints: bool = False,
        recompute_boxes: bool = False,
        keypoint_hflip_indices: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            is_train: whether to give annotations, and to skip unusable images; in evaluation these
                stop the run.
            augmentations: applied in order.
            image_format: channel order, "RGB" or "BGR".
            masks: give instance masks, as bitmaps: polygons, RLE and arrays alike.
            keypoints: give keypoints.
            recompute_boxes: take boxes from the masks after augmentation.
            keypoint_hflip_indices: where each keypoint goes in a horizontal flip.
        Raises: ValueError if boxes are to be recomputed without masks.
        """
        if recompute_boxes and not masks:
            raise ValueError("recompute_boxes=True needs masks=True.")
        super().__init__(
            is_train=is_train,
            augmentations=list(augmentations),
            image_format=image_format,
            use_instance_mask=masks,
            use_keypoint=keypoints,
            instance_mask_format="bitmask",
            keypoint_hflip_indices=keypoint_hflip_indices,
            recompute_boxes=recompute_boxes,
        )

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: a record in Detectron2's format; left unchanged.
        Returns: the record with ``image``, uint8 (3, H, W); in training ``sem_seg``, int64 (H, W),
            in place of ``sem_seg_file_name`` and ``label_rule``, and ``instances`` in place of
            ``annotations``, or of the things of panoptic segments where there are none; and
            ``data_issues``, {problem: count}, if there were any.
        Raises:
            SkippedImage if training has to do without the image;
            UnreadableImageError or SizeMismatchError in the same cases in evaluation;
            another OSError if the file does not exist or may not be read.
        """
        record = dict(dataset_dict)
        annotations = record.pop("annotations", None)
        image, problems = self._read(record)
        issues = Counter(problems)
        size = (image.shape[0], image.shape[1])

        sem_seg = self._read_labels(record, size) if self.is_train else None
        if self.is_train and annotations is None and "pan_seg_file_name" in record:
            annotations = self._read_segments(record)
        augmented = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))

        if self.is_train and annotations is not None:
            kept, found = clean_annotations(annotations, size, masks=self.use_instance_mask)
            issues.update(found)
            record["annotations"] = kept
            self._transform_annotations(record, transforms, image.shape[:2])
        if issues:
            record[DATA_ISSUES] = dict(issues)
        return record

    def _read(self, record: dict[str, Any]) -> tuple[NDArray[np.uint8], list[str]]:
        """Reads and checks the image of a record; adds its size to a record that has none."""
        try:
            image, problems = read_rgb(record["file_name"])
            array = to_array(image, self.image_format)
            detection_utils.check_image_size(record, array)
        except (UnreadableImageError, detection_utils.SizeMismatchError) as error:
            if not self.is_train:
                raise
            unreadable = isinstance(error, UnreadableImageError)
            raise SkippedImage(
                UNREADABLE_IMAGE if unreadable else SIZE_DIFFERS, str(error)
            ) from error
        return array, problems

    def _read_labels(
        self, record: dict[str, Any], size: tuple[int, int]
    ) -> NDArray[np.uint8] | NDArray[np.int32] | None:
        """Takes the semantic labels out of a record, if it names any."""
        path, rule = record.pop("sem_seg_file_name", None), record.pop("label_rule", None)
        if path is None:
            return None
        try:
            labels = read_labels(path, rule)
        except UnreadableLabelsError as error:
            raise SkippedImage(UNREADABLE_LABELS, str(error)) from error
        if labels.shape != size:
            raise SkippedImage(LABEL_SIZE_DIFFERS, size_message(path, labels.shape, size))
        # Types that the resizing of transforms can handle.
        return labels.astype(np.uint8 if labels.max(initial=0) <= 255 else np.int32)

    def _read_segments(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Instances of the panoptic segments of a record."""
        try:
            return segment_annotations(record)
        except UnreadableLabelsError as error:
            raise SkippedImage(UNREADABLE_LABELS, str(error)) from error

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: Sequence[int]
    ) -> None:
        if dataset_dict["annotations"]:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        # Detectron2 gives no masks here, and fails if boxes are to be recomputed from them.
        del dataset_dict["annotations"]
        instances = detection_utils.annotations_to_instances([], tuple(image_shape))
        if self.use_instance_mask:
            instances.gt_masks = BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))
        dataset_dict["instances"] = instances


class ViewMapper(InstanceMapper):
    """For evaluation with test-time augmentation: an image at several sizes, and mirrored.

    Args:
        views: augmentations of each view.
        image_format: channel order, "RGB" or "BGR".
    """

    def __init__(self, *, views: Sequence[Sequence[T.Augmentation]], image_format: str) -> None:
        super().__init__(is_train=False, augmentations=[], image_format=image_format)
        self.views = [T.AugmentationList(list(view)) for view in views]

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """
        Returns: the record with ``views``, a list of {``image``, ``height``, ``width``,
            ``transforms``}, in place of ``image``; errors as in InstanceMapper.
        """
        record = super().__call__(dataset_dict)
        original = record.pop("image").permute(1, 2, 0).numpy()
        record["views"] = []
        for augmentations in self.views:
            augmented = T.AugInput(original)
            transforms = augmentations(augmented)
            image = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
            view = {"image": torch.as_tensor(image), "transforms": transforms}
            record["views"].append({**view, "height": record["height"], "width": record["width"]})
        return record


def size_message(path: Any, labels: tuple[int, ...], image: tuple[int, ...]) -> str:
    """What is wrong with labels of another size than their image, (height, width) each."""
    return (
        f"Label file {path} is {labels[0]} x {labels[1]} (height x width), its image "
        f"{image[0]} x {image[1]}."
    )


def clean_annotations(
    annotations: Iterable[Mapping[str, Any]], size: tuple[int, int], *, masks: bool
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Annotations that can be trained on.

    Args:
        annotations: of one image, in Detectron2's format; left unchanged.
        size: height and width of the image, pixels.
        masks: whether each must have a mask.
    Returns: copies, repaired where need be, and counts by problem of ``POLICIES``. Boxes are xyxy,
        absolute pixels, inside the image; masks are polygons in float64 or compressed RLE.
    """
    issues: Counter[str] = Counter()
    kept = []
    for annotation in annotations:
        cleaned, problems = clean_annotation(annotation, size, masks=masks)
        issues.update(problems)
        if cleaned is not None:
            kept.append(cleaned)
    if not kept:
        issues[NO_ANNOTATION] += 1
    return kept, issues


def clean_annotation(
    annotation: Mapping[str, Any], size: tuple[int, int], *, masks: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """One annotation of ``clean_annotations``, None if it is dropped, and its problems."""
    if annotation.get("iscrowd", 0):
        return None, [CROWD]
    box = box_xyxy(annotation)
    if box is None:
        return None, [MALFORMED_BOX]
    height, width = size
    clipped = np.clip(box, 0, [width, height, width, height])
    if (clipped[2:] - clipped[:2] <= SMALLEST_SIDE).any():
        return None, [EMPTY_BOX]
    outside = bool((np.abs(clipped - box) > BOX_ROUNDING).any())
    problems = [BOX_OUTSIDE] if outside else []
    cleaned = {**annotation, "bbox": clipped.tolist(), "bbox_mode": BoxMode.XYXY_ABS}
    if "keypoints" in annotation:
        # Detectron2 moves the points of an array in place.
        cleaned["keypoints"] = np.array(annotation["keypoints"], dtype=np.float64)
    if masks:
        segmentation, problem = clean_segmentation(annotation.get("segmentation"), size)
        if problem:
            problems.append(problem)
        if segmentation is None:
            return None, problems
        cleaned["segmentation"] = segmentation
    return cleaned, problems


def box_xyxy(annotation: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Box of an annotation, xyxy, absolute pixels; None if it is missing or malformed."""
    try:
        # As floats: Detectron2 cuts off the decimals when it resizes boxes of integers.
        numbers = [float(number) for number in annotation["bbox"]]
        box = BoxMode.convert(numbers, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    except (KeyError, TypeError, ValueError, AssertionError):
        return None
    box = np.asarray(box, dtype=np.float64)
    return box if box.shape == (4,) and np.isfinite(box).all() else None


def clean_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Any, str | None]:
    """A mask of any kind, as Detectron2's transforms take it.

    Args:
        segmentation: polygons (a list of x, y, x, y, ..., absolute pixels), RLE, compressed or not,
            or an array (H, W) that is not 0 inside the mask.
        size: height and width of the image, pixels.
    Returns: polygons or compressed RLE, None if the mask is dropped; and its problem, or None.
    """
    if segmentation is None or (isinstance(segmentation, list) and not segmentation):
        return None, NO_MASK
    if isinstance(segmentation, list):
        return clean_polygons(segmentation, size)
    if isinstance(segmentation, dict):
        return clean_rle(segmentation, size)
    if not isinstance(segmentation, np.ndarray) or segmentation.shape != size:
        return None, MALFORMED_MASK
    if not segmentation.any():
        return None, EMPTY_MASK
    return mask_utils.encode(np.asfortranarray(segmentation != 0, dtype=np.uint8)), None


def clean_polygons(
    parts: Sequence[Any], size: tuple[int, int]
) -> tuple[list[NDArray[np.float64]] | None, str | None]:
    """Well-formed polygons of a mask; see ``clean_segmentation``."""
    polygons = [polygon for part in parts if (polygon := well_formed(part, size)) is not None]
    if not polygons:
        return None, MALFORMED_MASK
    if not np.any(mask_utils.area(mask_utils.frPyObjects(polygons, *size))):
        return None, EMPTY_MASK
    return polygons, None if len(polygons) == len(parts) else MALFORMED_PART


def well_formed(part: Any, size: tuple[int, int]) -> NDArray[np.float64] | None:
    """A polygon as a new array (2 N,) of x, y, x, y, ...; None if it is malformed."""
    try:
        # As floats: Detectron2 cuts off the decimals when it resizes polygons of integers.
        polygon = np.array(part, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        return None
    if not enough_coordinates(polygon):
        return None
    # The time and memory that pycocotools takes grow with the outline, without limit.
    margin = max(size)
    xy = polygon.reshape(-1, 2)
    # Written so that NaN is out of range.
    inside = (xy >= -margin) & (xy <= np.array(size[::-1]) + margin)
    return polygon if inside.all() else None


def enough_coordinates(polygon: Any) -> bool:
    """Whether a polygon has three points or more, and y for every x."""
    return len(polygon) % 2 == 0 and len(polygon) >= 6


def clean_rle(
    rle: Mapping[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any] | None, str | None]:
    """A run-length encoded mask, compressed; see ``clean_segmentation``."""
    try:
        runs = run_lengths(rle["counts"])
        same_size = tuple(rle["size"]) == size
    except (KeyError, TypeError, ValueError):
        return None, MALFORMED_MASK
    # pycocotools decodes runs that end early into memory that it did not set.
    if not same_size or min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        return None, MALFORMED_MASK
    if not any(runs[1::2]):
        return None, EMPTY_MASK
    return mask_utils.frPyObjects({"size": list(size), "counts": runs}, *size), None


def run_lengths(counts: Any) -> list[int]:
    """Lengths of the runs outside, inside, outside, ... a mask, from either kind of RLE.

    The compressed kind holds differences to the run before the last, from the fourth run on, in
    groups of five bits, lowest first; each character, less 48, is a group and a sixth bit that says
    whether another follows. The highest bit of the last group is the sign.

    Raises: TypeError or ValueError if it is neither.
    Source: cocodataset/cocoapi:common/maskApi.c (rleFrString).
    """
    if not isinstance(counts, str | bytes):
        if any(int(run) != run for run in counts):
            raise ValueError("A run of a fraction of a pixel.")
        return [int(run) for run in counts]
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        group = character - 48
        if not 0 <= group < 64:
            raise ValueError(f"No character of compressed RLE: {character}.")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("Compressed RLE that ends within a number.")
    return runs


def problems_of_file(content: Mapping[str, Any]) -> dict[str, int]:
    """Problems that Detectron2's ``load_coco_json`` settles itself, so that no record shows them.

    It leaves out polygons without enough coordinates, annotations that have no other polygon, and
    annotations of images that the file does not list.

    Args:
        content: of a COCO file.
    Returns: counts by problem of ``POLICIES``, without zeros.
    """
    images = {image["id"] for image in content["images"]}
    issues: Counter[str] = Counter()
    for annotation in content["annotations"]:
        segmentation = annotation.get("segmentation")
        if annotation["image_id"] not in images:
            issues[UNLISTED_IMAGE] += 1
        elif segmentation and isinstance(segmentation, list):
            enough = sum(map(enough_coordinates, segmentation))
            if enough < len(segmentation):
                issues[MALFORMED_PART if enough else MALFORMED_MASK] += 1
    return dict(issues)
