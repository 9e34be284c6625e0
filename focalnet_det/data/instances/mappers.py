"""Map dataset records to model inputs, and handle invalid images and annotations."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints
from numpy.typing import NDArray

from ..io.labels import UnreadableLabelsError, read_labels
from ..io.masks import clean_segmentation
from ..io.read_image import UnreadableImageError, read_rgb, to_array
from ..issue_policies import (
    BOX_OUTSIDE,
    CROWD,
    EMPTY_BOX,
    LABEL_SIZE_DIFFERS,
    MALFORMED_BOX,
    NO_ANNOTATION,
    SIZE_DIFFERS,
    UNREADABLE_IMAGE,
    UNREADABLE_LABELS,
    VOID_SEGMENT,
)
from ..panoptic.segments import all_listed, read_segment_ids, segment_annotations

DATA_ISSUES = "data_issues"
# Pixels; published coordinates have two decimals.
BOX_ROUNDING = 0.01
# Pixels; Detectron2 treats narrower boxes as empty too (filter_empty_instances).
MIN_BOX_SIDE = 1e-5


class SkippedImage(Exception):
    """Signal an image that training cannot use and should replace by another one.

    Attributes:
        problem: issue of ``ISSUE_POLICIES``.
        issues: {problem: 1}, for ``IssueCounter.add``.
    """

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(problem, detail)  # pickling recreates the exception from these
        self.problem = problem
        self.issues = {problem: 1}

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class InstanceMapper(DatasetMapper):
    """Read, augment and convert images with boxes, masks and keypoints.

    For valid records the result equals that of Detectron2's ``DatasetMapper``. Issues are handled
    as ``ISSUE_POLICIES`` says, and counted under ``data_issues`` of the result.

    Images without annotations get instances of length 0, including masks.
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
        """Create a mapper.

        Args:
            is_train: return annotations, and skip unusable images, which are errors in evaluation.
            augmentations: applied in order.
            image_format: channel order, "RGB" or "BGR".
            masks: return instance masks as bitmaps, whether given as polygons, RLE or arrays.
            keypoints: return keypoints.
            recompute_boxes: recompute the boxes of objects that augmentation cuts or rotates from
                their masks; other boxes keep their subpixel coordinates.
            keypoint_hflip_indices: permutation of the keypoints in a horizontal flip.

        Raises: ValueError if ``recompute_boxes`` is set without ``masks``.
        """
        if recompute_boxes and not masks:
            raise ValueError("recompute_boxes=True requires masks=True.")
        super().__init__(
            is_train=is_train,
            augmentations=list(augmentations),
            image_format=image_format,
            use_instance_mask=masks,
            use_keypoint=keypoints,
            instance_mask_format="bitmask",
            keypoint_hflip_indices=keypoint_hflip_indices,
        )
        self.recompute_boxes = recompute_boxes

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Map a record to a sample.

        Args:
            dataset_dict: a record in Detectron2's format, or with an RGB ``picture`` of Pillow
                instead of ``file_name``; left unchanged.
        Returns: the record with ``image``, uint8 (3, H, W). In training, ``sem_seg``, int64 (H, W),
            replaces ``sem_seg_file_name`` and ``label_rule``; ``instances`` replaces
            ``annotations``, or is created from the things of panoptic segments; ``data_issues``,
            {issue: count}, is added if there are any.
        Raises: SkippedImage if training cannot use the image; UnreadableImageError or
            SizeMismatchError in the same cases in evaluation; another OSError if the file does not
            exist or cannot be opened.
        """
        record = dict(dataset_dict)
        annotations = record.pop("annotations", None)
        image, problems = self._read(record)
        issues = Counter(problems)
        size = (image.shape[0], image.shape[1])

        sem_seg = self._read_labels(record, size) if self.is_train else None
        if self.is_train and annotations is None and "pan_seg_file_name" in record:
            annotations, disagreements = self._read_segments(record)
            issues.update(disagreements)
        augmented = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))

        if self.is_train and annotations is not None:
            record["annotations"], counts = clean_annotations(
                annotations, size, masks=self.use_instance_mask
            )
            issues.update(counts)
            self._transform_annotations(record, transforms, image.shape[:2])
        if issues:
            record[DATA_ISSUES] = dict(issues)
        return record

    def _read(self, record: dict[str, Any]) -> tuple[NDArray[np.uint8], list[str]]:
        """Read the image of a record and check its size, or add the size if it is absent."""
        try:
            image, problems = (
                (record.pop("picture"), [])
                if "picture" in record
                else read_rgb(record["file_name"])
            )
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
        """Remove the label file from a record and read it, if there is one."""
        path, rule = record.pop("sem_seg_file_name", None), record.pop("label_rule", None)
        if path is None:
            return None
        try:
            labels = read_labels(path, rule)
        except UnreadableLabelsError as error:
            raise SkippedImage(UNREADABLE_LABELS, str(error)) from error
        if labels.shape != size:
            raise SkippedImage(LABEL_SIZE_DIFFERS, size_mismatch_message(path, labels.shape, size))
        # Detectron2's transforms can resize these types, but not int64.
        return labels.astype(np.uint8 if labels.max(initial=0) <= 255 else np.int32)

    def _read_segments(self, record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """Return annotations of the panoptic segments of a record, and issues."""
        try:
            ids = read_segment_ids(record["pan_seg_file_name"])
        except UnreadableLabelsError as error:
            raise SkippedImage(UNREADABLE_LABELS, str(error)) from error
        segments = record["segments_info"]
        problems = [] if all_listed(ids, segments) else [VOID_SEGMENT]
        return segment_annotations(ids, segments), problems

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: Sequence[int]
    ) -> None:
        """Replace annotations, with xyxy boxes in pixels of the input, by augmented instances."""
        annotations, shape = dataset_dict.pop("annotations"), tuple(image_shape)
        for annotation in annotations:
            self._choose_fields(annotation)
        boxes = np.array([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        transformed = [
            detection_utils.transform_instance_annotations(
                annotation, transforms, shape, keypoint_hflip_indices=self.keypoint_hflip_indices
            )
            for annotation in annotations
        ]
        instances = detection_utils.annotations_to_instances(
            transformed, shape, mask_format="bitmask"
        )
        if not transformed:
            self._add_empty_fields(instances, shape)
        elif self.recompute_boxes:
            instances.gt_boxes = Boxes(
                recompute_cut_boxes(
                    instances, transforms.apply_box(boxes), rotated=has_rotation(transforms)
                )
            )
        dataset_dict["instances"] = detection_utils.filter_empty_instances(instances)

    def _choose_fields(self, annotation: dict[str, Any]) -> None:
        """Remove unused fields, and give objects without keypoints invisible ones."""
        if not self.use_instance_mask:
            annotation.pop("segmentation", None)
        if not self.use_keypoint:
            annotation.pop("keypoints", None)
        elif self.keypoint_hflip_indices is not None and "keypoints" not in annotation:
            annotation["keypoints"] = np.zeros(3 * len(self.keypoint_hflip_indices))

    def _add_empty_fields(self, instances: Instances, shape: tuple[int, ...]) -> None:
        """Add masks and keypoints of length 0, which Detectron2 omits."""
        if self.use_instance_mask:
            instances.gt_masks = BitMasks(torch.zeros(0, *shape, dtype=torch.bool))
        if self.use_keypoint and self.keypoint_hflip_indices is not None:
            count = len(self.keypoint_hflip_indices)
            instances.gt_keypoints = Keypoints(np.zeros((0, count, 3), dtype=np.float32))


def has_rotation(transforms: T.TransformList) -> bool:
    """Return whether transforms include a rotation, after which boxes are loose."""
    return any(isinstance(transform, T.RotationTransform) for transform in transforms.transforms)


def recompute_cut_boxes(
    instances: Instances, unclipped: NDArray[np.float64], *, rotated: bool
) -> torch.Tensor:
    """Recompute the boxes of objects that augmentation cut or rotated from their masks.

    Args:
        instances: with boxes clipped to the image, and bitmap masks.
        unclipped: the boxes before clipping, (N, 4), xyxy, absolute pixels.
        rotated: recompute all boxes, not only those that extend beyond the image.
    Returns: (N, 4), xyxy, absolute pixels.
    """
    height, width = instances.image_size
    clipped = instances.gt_boxes.tensor
    limits = np.array([width, height, width, height])
    outside = (unclipped < -BOX_ROUNDING) | (unclipped > limits + BOX_ROUNDING)
    is_cut = outside.any(axis=1) | rotated
    return fit_boxes_to_masks(clipped, instances.gt_masks, torch.as_tensor(is_cut))


def fit_boxes_to_masks(boxes: torch.Tensor, masks: BitMasks, changed: torch.Tensor) -> torch.Tensor:
    """Replace the boxes of changed masks by tight ones.

    A side within a pixel of its tight position keeps its subpixel coordinate.

    Args:
        boxes: (N, 4), xyxy, absolute pixels.
        masks: N bitmaps.
        changed: which masks changed, bool (N,).
    Returns: (N, 4).
    """
    if not changed.any():
        return boxes
    result = boxes.clone()
    tight = masks[changed].get_bounding_boxes().tensor
    loose = result[changed]
    result[changed] = torch.where((tight - loose).abs() < 1, loose, tight)
    return result


class ViewMapper(InstanceMapper):
    """Map an image to several resized and mirrored views, for test-time augmentation.

    Args:
        views: augmentations of each view.
        image_format: channel order, "RGB" or "BGR".
    """

    def __init__(self, *, views: Sequence[Sequence[T.Augmentation]], image_format: str) -> None:
        super().__init__(is_train=False, augmentations=[], image_format=image_format)
        self.views = [T.AugmentationList(list(view)) for view in views]

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Map a record to a sample.

        Returns: the record with ``views``, a list of {``image``, ``height``, ``width``,
            ``transforms``}, instead of ``image``.
        Raises: as :class:`InstanceMapper` in evaluation.
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


def size_mismatch_message(path: Any, labels: tuple[int, ...], image: tuple[int, ...]) -> str:
    """Format an error message about labels whose size differs from the image.

    Args:
        path: label file.
        labels, image: height and width, pixels.
    """
    return (
        f"Label file {path} is {labels[0]} x {labels[1]} (height x width), its image "
        f"{image[0]} x {image[1]}."
    )


def clean_annotations(
    annotations: Iterable[Mapping[str, Any]], size: tuple[int, int], *, masks: bool
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Repair or drop invalid annotations of an image.

    Args:
        annotations: in Detectron2's format; left unchanged.
        size: height and width of the image, pixels.
        masks: drop annotations without a valid mask.
    Returns: usable annotations (copies), and counts by issue of ``ISSUE_POLICIES``. Boxes are
        xyxy, absolute pixels, clipped to the image; masks are polygons in float64 or compressed
        RLE.
    """
    issues: Counter[str] = Counter()
    usable = []
    for annotation in annotations:
        cleaned, problems = clean_annotation(annotation, size, masks=masks)
        issues.update(problems)
        if cleaned is not None:
            usable.append(cleaned)
    if not usable:
        issues[NO_ANNOTATION] += 1
    return usable, issues


def clean_annotation(
    annotation: Mapping[str, Any], size: tuple[int, int], *, masks: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Repair one annotation; return it, or None if it is dropped, and its issues.

    Arguments as in ``clean_annotations``.
    """
    if annotation.get("iscrowd", 0):
        return None, [CROWD]
    box = box_xyxy(annotation)
    if box is None:
        return None, [MALFORMED_BOX]
    height, width = size
    clipped = np.clip(box, 0, [width, height, width, height])
    if (clipped[2:] - clipped[:2] <= MIN_BOX_SIDE).any():
        return None, [EMPTY_BOX]
    outside = bool((np.abs(clipped - box) > BOX_ROUNDING).any())
    problems = [BOX_OUTSIDE] if outside else []
    cleaned = {**annotation, "bbox": clipped.tolist(), "bbox_mode": BoxMode.XYXY_ABS}
    if "keypoints" in annotation:
        # Copied: Detectron2 transforms the points of an array in place.
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
    """Return the box of an annotation, xyxy, absolute pixels; None if missing or malformed."""
    try:
        # As floats: Detectron2 truncates when it resizes integer boxes.
        numbers = [float(number) for number in annotation["bbox"]]
        if any(isinstance(number, str) for number in annotation["bbox"]):
            return None
        box = BoxMode.convert(numbers, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError):
        return None
    box = np.asarray(box, dtype=np.float64)
    is_valid = box.shape == (4,) and np.isfinite(box).all() and (box[2:] >= box[:2]).all()
    return box if is_valid else None
