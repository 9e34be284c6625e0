"""From a record of a data set to what a model takes, whatever its image and labels are like."""

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
# Published coordinates have two decimals.
BOX_ROUNDING = 0.01
# Narrower boxes count as empty in Detectron2 too (filter_empty_instances).
SMALLEST_SIDE = 1e-5


class SkippedImage(Exception):
    """An image that training does without: draw another one.

    Attributes:
        problem: name of the row in ``ISSUE_POLICIES``.
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
    does what ``ISSUE_POLICIES`` says, and ``data_issues`` of its result holds {problem: count}.

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
        """Args:
            is_train: whether to give annotations, and to skip unusable images; in evaluation these
                stop the run.
            augmentations: applied in order.
            image_format: channel order, "RGB" or "BGR".
            masks: give instance masks, as bitmaps: polygons, RLE and arrays alike.
            keypoints: give keypoints.
            recompute_boxes: take the boxes of objects that augmentation cut, or rotated, from what
                is left of their masks; other boxes keep their fractions of a pixel.
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
        )
        self.recompute_boxes = recompute_boxes

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Args:
            dataset_dict: a record in Detectron2's format, or with an RGB ``picture`` of Pillow in
                place of ``file_name``; left unchanged.
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
            annotations, disagreements = self._read_segments(record)
            issues.update(disagreements)
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

    def _read_segments(self, record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """Return instances of the panoptic segments of a record, and problems."""
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
        """Put augmented instances in place of annotations, whose boxes are xyxy in the image."""
        annotations, shape = dataset_dict.pop("annotations"), tuple(image_shape)
        for annotation in annotations:
            self._choose_fields(annotation)
        boxes = np.array([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        moved = [
            detection_utils.transform_instance_annotations(
                annotation, transforms, shape, keypoint_hflip_indices=self.keypoint_hflip_indices
            )
            for annotation in annotations
        ]
        instances = detection_utils.annotations_to_instances(moved, shape, mask_format="bitmask")
        if not moved:
            self._add_empty_fields(instances, shape)
        elif self.recompute_boxes:
            instances.gt_boxes = Boxes(
                tight_boxes(instances, transforms.apply_box(boxes), is_rotated(transforms))
            )
        dataset_dict["instances"] = detection_utils.filter_empty_instances(instances)

    def _choose_fields(self, annotation: dict[str, Any]) -> None:
        """Remove what is not trained; objects without keypoints get invisible ones."""
        if not self.use_instance_mask:
            annotation.pop("segmentation", None)
        if not self.use_keypoint:
            annotation.pop("keypoints", None)
        elif self.keypoint_hflip_indices is not None and "keypoints" not in annotation:
            annotation["keypoints"] = np.zeros(3 * len(self.keypoint_hflip_indices))

    def _add_empty_fields(self, instances: Instances, shape: tuple[int, ...]) -> None:
        """Add masks and keypoints of length 0, which Detectron2 leaves out."""
        if self.use_instance_mask:
            instances.gt_masks = BitMasks(torch.zeros(0, *shape, dtype=torch.bool))
        if self.use_keypoint and self.keypoint_hflip_indices is not None:
            count = len(self.keypoint_hflip_indices)
            instances.gt_keypoints = Keypoints(np.zeros((0, count, 3), dtype=np.float32))


def is_rotated(transforms: T.TransformList) -> bool:
    """Return whether transforms turn boxes by other than right angles."""
    return any(isinstance(transform, T.RotationTransform) for transform in transforms.transforms)


def tight_boxes(instances: Instances, moved: NDArray[np.float64], rotated: bool) -> torch.Tensor:
    """Return boxes that are tight around what augmentation has left of the masks.

    Args:
        instances: with boxes clipped to the image, and bitmap masks.
        moved: the boxes before clipping, (N, 4), xyxy, absolute pixels.
        rotated: whether all boxes, and not only those that reach out of the image, are loose.
    Returns: (N, 4). A side that the mask confirms to a pixel keeps its fraction.
    """
    height, width = instances.image_size
    clipped = instances.gt_boxes.tensor
    limits = np.array([width, height, width, height])
    cut = ((moved < -BOX_ROUNDING) | (moved > limits + BOX_ROUNDING)).any(axis=1) | rotated
    return follow_masks(clipped, instances.gt_masks, torch.as_tensor(cut))


def follow_masks(boxes: torch.Tensor, masks: BitMasks, changed: torch.Tensor) -> torch.Tensor:
    """Return boxes, (N, 4), of which those of changed masks, (N,), are tight around them.

    A side that the mask confirms to a pixel keeps its fraction.
    """
    if not changed.any():
        return boxes
    result = boxes.clone()
    tight = masks[changed].get_bounding_boxes().tensor
    own = result[changed]
    result[changed] = torch.where((tight - own).abs() < 1, own, tight)
    return result


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
        """Returns: the record with ``views``, a list of {``image``, ``height``, ``width``,
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
    Returns: copies, repaired where need be, and counts by issue of ``ISSUE_POLICIES``. Boxes are
        xyxy, absolute pixels, inside the image; masks are polygons in float64 or compressed RLE.
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
        if any(isinstance(number, str) for number in annotation["bbox"]):
            return None
        box = BoxMode.convert(numbers, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError):
        return None
    box = np.asarray(box, dtype=np.float64)
    sound = box.shape == (4,) and np.isfinite(box).all() and (box[2:] >= box[:2]).all()
    return box if sound else None
