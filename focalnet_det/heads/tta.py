"""Apply test-time augmentation: predict on resized and flipped views, and merge the predictions.

The mechanism is the same for every task: the model predicts on each view, and a merger per task
combines the predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from detectron2.data import transforms as T
from detectron2.layers import batched_nms
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..layers.padded_batch import padded_batch

VIEWS = "views"
TRANSFORMS = "transforms"

Record = Mapping[str, Any]


class TestTimeAugmentation(nn.Module):
    """Wrapper that runs a model on each view of an image and merges the predictions per task.

    A record lists its views under "views". A view is an input of the model with "transforms", which
    map the original image to the view. Records without views are passed to the model unchanged.

    Args:
        model: must be in eval mode when it is called.
    Raises: KeyError, at the first image, for a task that is not in ``MERGERS``.
    """

    __test__ = False  # keeps pytest from collecting the class

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Detectron2's evaluation restores the mode that it reads here.
        self.training = model.training

    def forward(self, batched_inputs: Sequence[Record]) -> list[dict[str, Any]]:
        """Return {task: prediction} for each record, as the model does."""
        return [self.predict(record) for record in batched_inputs]

    def predict(self, record: Record) -> dict[str, Any]:
        """Return {task: prediction} for one record."""
        if VIEWS not in record:
            predictions: dict[str, Any] = self.model([record])[0]
            return predictions
        mergers: dict[str, Merger] = {}
        # One view at a time, to hold the predictions of one view in memory rather than of all.
        for view in record[VIEWS]:
            for task, value in self.model([view])[0].items():
                if task not in MERGERS:
                    raise KeyError(
                        f"Test-time augmentation cannot merge {task!r}. "
                        f"Known: {', '.join(MERGERS)}."
                    )
                mergers.setdefault(task, MERGERS[task](self.model)).add(value, view)
        merged: dict[str, Any] = {}
        for task in MERGERS:
            if task in mergers:
                merged[task] = mergers[task].result(merged)
        return merged


class Merger(Protocol):
    """Combines the predictions of one task on the views of an image."""

    def add(self, value: Any, view: Record) -> None:
        """Add the prediction on one view: in the original size, flipped if the view is."""

    def result(self, merged: Mapping[str, Any], /) -> Any:
        """Return the merged prediction, given those of the earlier tasks in ``MERGERS``."""


class SemanticMerger:
    """Mean over all views: of class probabilities, or of a mask classifier's scores.

    A model whose class has ``semantic_outputs_are_scores`` returns scores, which add up over its
    queries and are no logits: they are averaged as they are.

    Source: open-mmlab/mmsegmentation:mmseg/models/segmentors/encoder_decoder.py (aug_test);
    facebookresearch/Mask2Former:mask2former/test_time_augmentation.py.
    """

    def __init__(self, model: nn.Module, /) -> None:
        self.are_scores = bool(getattr(model, "semantic_outputs_are_scores", False))
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor, view: Record) -> None:
        """Add one view: logits or scores (K, H, W)."""
        probabilities = value if self.are_scores else value.softmax(dim=0)
        if is_flipped(view[TRANSFORMS]):
            probabilities = probabilities.flip(-1)
        self.total = probabilities if self.total is None else self.total + probabilities
        self.count += 1

    def result(self, _merged: Mapping[str, Any], /) -> Tensor:
        """Return the mean probabilities or scores (K, H, W)."""
        assert self.total is not None
        return self.total / self.count


class InstanceMerger:
    """Non-maximum suppression over the boxes of all views; masks are averaged over the views.

    Threshold and number of detections are those of the model. Models with a mask branch predict the
    masks of the merged boxes on each view; otherwise each box has the mask of its view.

    Source: facebookresearch/detectron2:detectron2/modeling/test_time_augmentation.py.
    """

    def __init__(self, model: nn.Module) -> None:
        # Any, because not every model has the modules of Detectron2's detectors.
        self.model: Any = model
        self.views: list[Record] = []
        self.predictions: list[Instances] = []

    def add(self, value: Instances, view: Record) -> None:
        """Add the instances of one view.

        Raises: ValueError for keypoints, which cannot be merged.
        """
        if value.has("pred_keypoints"):
            raise ValueError(
                "Test-time augmentation cannot merge keypoints: evaluate without views."
            )
        self.views.append(view)
        if self.has_mask_branch:
            # `mean_masks` predicts them again; the masks of all views would exhaust the memory.
            fields = {k: v for k, v in value.get_fields().items() if k != "pred_masks"}
            value = Instances(value.image_size, **fields)
        self.predictions.append(flip_instances(value) if is_flipped(view[TRANSFORMS]) else value)

    @property
    def has_mask_branch(self) -> bool:
        """Tell whether the model can predict the masks of given boxes."""
        return bool(getattr(getattr(self.model, "roi_heads", None), "mask_on", False))

    def result(self, _merged: Mapping[str, Any], /) -> Instances:
        """Return the merged instances, sorted by score."""
        everything = Instances.cat(self.predictions)
        threshold, limit = nms_settings(self.model)
        kept = batched_nms(
            everything.pred_boxes.tensor, everything.scores, everything.pred_classes, threshold
        )
        result = everything[kept[:limit]]
        if self.has_mask_branch:
            result.pred_masks = self.mean_masks(result)
            # Pastes the masks into the image, at an unchanged size.
            result = detector_postprocess(result, *result.image_size)
        return result

    def mean_masks(self, merged: Instances) -> Tensor:
        """Average the mask probabilities of merged boxes over the views, (N, 1, S, S)."""
        total: Tensor | None = None
        for view in self.views:
            boxes = view[TRANSFORMS].apply_box(merged.pred_boxes.tensor.cpu().numpy())
            given = Instances(tuple(view["image"].shape[-2:]))
            device = merged.scores.device
            given.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32, device=device))
            given.pred_classes, given.scores = merged.pred_classes, merged.scores
            images = self.model.preprocess_image([view])
            with padded_batch(images.image_sizes):
                features = self.model.backbone(images.tensor)
                (predicted,) = self.model.roi_heads.forward_with_given_boxes(features, [given])
            masks = predicted.pred_masks
            if is_flipped(view[TRANSFORMS]):
                masks = masks.flip(-1)
            total = masks if total is None else total + masks
        assert total is not None
        return total / len(self.views)


class PanopticMerger:
    """Panoptic FPN's combination of merged instances and merged semantic probabilities.

    Raises: ValueError if the model has no thresholds for the combination.
    """

    def __init__(self, model: nn.Module) -> None:
        names = ("overlap_thresh", "stuff_area_thresh", "instances_score_thresh")
        try:
            self.thresholds = [getattr(model, f"combine_{name}") for name in names]
        except AttributeError as error:
            raise ValueError(
                "Test-time augmentation of panoptic segmentation supports panoptic FPN only: "
                f"{type(model).__name__} has no thresholds to combine things and stuff."
            ) from error

    def add(self, value: Any, view: Record) -> None:
        """Ignore the prediction: `result` combines those of the other tasks."""

    def result(self, merged: Mapping[str, Any], /) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the map of segment ids (H, W), and the segments."""
        classes = merged["sem_seg"].argmax(dim=0)
        ids, segments = combine_semantic_and_instance_outputs(
            merged["instances"], classes, *self.thresholds
        )
        return ids, segments


class ClassMerger:
    """Mean of the class probabilities of all views, as logits; flips leave them as they are."""

    def __init__(self, _model: nn.Module, /) -> None:
        self.probabilities: list[Tensor] = []

    def add(self, value: Tensor, _view: Record, /) -> None:
        """Add one view: logits (K,)."""
        self.probabilities.append(value.softmax(dim=0))

    def result(self, _merged: Mapping[str, Any], /) -> Tensor:
        """Return the logarithm of the mean probabilities (K,)."""
        return torch.stack(self.probabilities).mean(dim=0).log()


# In this order: a merger may use the results of earlier tasks.
MERGERS: dict[str, Callable[[nn.Module], Merger]] = {
    "sem_seg": SemanticMerger,
    "instances": InstanceMerger,
    "panoptic_seg": PanopticMerger,
    "class_scores": ClassMerger,
}


def is_flipped(transforms: T.TransformList) -> bool:
    """Tell whether the transforms include an odd number of horizontal flips."""
    return sum(isinstance(t, T.HFlipTransform) for t in transforms.transforms) % 2 == 1


def flip_instances(instances: Instances) -> Instances:
    """Flip instances horizontally: boxes (N, 4), xyxy, absolute pixels, and masks (N, H, W)."""
    width = instances.image_size[1]
    fields = dict(instances.get_fields())
    x0, y0, x1, y1 = fields["pred_boxes"].tensor.unbind(dim=1)
    fields["pred_boxes"] = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    if "pred_masks" in fields:
        fields["pred_masks"] = fields["pred_masks"].flip(-1)
    return Instances(instances.image_size, **fields)


def nms_settings(model: nn.Module) -> tuple[float, int]:
    """Return the IoU threshold of a detector's NMS, and its maximum of detections per image.

    The default, for models without these attributes, is Detectron2's: 0.5 and 100.
    """
    threshold, limit = 0.5, 100
    module: Any
    for module in model.modules():
        if hasattr(module, "test_nms_thresh"):
            names = ("test_topk_per_image", "max_detections_per_image")
            limits = [getattr(module, name) for name in names if hasattr(module, name)]
            return float(module.test_nms_thresh), int(limits[0]) if limits else limit
    return threshold, limit
