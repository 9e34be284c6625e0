"""Test-time augmentation: an image at several sizes and mirrored, and one answer.

One mechanism for every task: the model answers for each view, and a merger of each task makes one
answer of them.
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
    """Runs a model on each view of an image and merges the answers, task by task.

    A view is a record of its own under "views": what the model takes, and "transforms", how its
    image came from the original one. Records without views go to the model as they are.

    Args:
        model: put into eval mode before it is called.
    Raises: KeyError, at the first image, for a kind of answer that has no rule in ``MERGERS``.
    """

    __test__ = False  # pytest takes it for a test otherwise

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Detectron2 puts back the mode that it finds here.
        self.training = model.training

    def forward(self, batched_inputs: Sequence[Record]) -> list[dict[str, Any]]:
        """Return {task: answer} for each record, as the model does."""
        return [self.answer(record) for record in batched_inputs]

    def answer(self, record: Record) -> dict[str, Any]:
        """Return {task: answer} of one record."""
        if VIEWS not in record:
            answers: dict[str, Any] = self.model([record])[0]
            return answers
        mergers: dict[str, Merger] = {}
        # One view at a time: the answers to one are held, not to all.
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
    """Makes one answer of those to the views of an image."""

    def add(self, value: Any, view: Record) -> None:
        """Add the answer to one view, of the original image's size, mirrored if the view is."""

    def result(self, merged: Mapping[str, Any], /) -> Any:
        """Return the answer, given those of the tasks before it in ``MERGERS``."""


class SemanticMerger:
    """Mean of the class probabilities of all views.

    Source: open-mmlab/mmsegmentation:mmseg/models/segmentors/encoder_decoder.py (aug_test).
    """

    def __init__(self, _model: nn.Module, /) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor, view: Record) -> None:
        """Add one view: logits (K, H, W)."""
        probabilities = value.softmax(dim=0)
        if is_mirrored(view[TRANSFORMS]):
            probabilities = probabilities.flip(-1)
        self.total = probabilities if self.total is None else self.total + probabilities
        self.count += 1

    def result(self, _merged: Mapping[str, Any], /) -> Tensor:
        """Return probabilities (K, H, W)."""
        assert self.total is not None
        return self.total / self.count


class InstanceMerger:
    """Non-maximum suppression over the boxes of all views; masks are the mean over the views.

    Threshold and number of detections are the model's own. For the masks, models with a box head
    are asked again, about the merged boxes on each view; of others, a box keeps its own mask.

    Source: facebookresearch/detectron2:detectron2/modeling/test_time_augmentation.py.
    """

    def __init__(self, model: nn.Module) -> None:
        # Any: the parts of Detectron2's detectors are not known to be there.
        self.model: Any = model
        self.views: list[Record] = []
        self.predictions: list[Instances] = []

    def add(self, value: Instances, view: Record) -> None:
        """Add one view.

        Raises: ValueError for keypoints, which have no rule.
        """
        if value.has("pred_keypoints"):
            raise ValueError(
                "Test-time augmentation has no rule for keypoints: leave out the views."
            )
        self.views.append(view)
        if self.has_mask_branch:
            # They are made anew: those of all views would fill the memory.
            fields = {k: v for k, v in value.get_fields().items() if k != "pred_masks"}
            value = Instances(value.image_size, **fields)
        self.predictions.append(unmirror(value) if is_mirrored(view[TRANSFORMS]) else value)

    @property
    def has_mask_branch(self) -> bool:
        """Whether the model predicts the masks of given boxes."""
        return bool(getattr(getattr(self.model, "roi_heads", None), "mask_on", False))

    def result(self, _merged: Mapping[str, Any], /) -> Instances:
        """Return the instances, best first."""
        everything = Instances.cat(self.predictions)
        threshold, limit = suppression(self.model)
        kept = batched_nms(
            everything.pred_boxes.tensor, everything.scores, everything.pred_classes, threshold
        )
        result = everything[kept[:limit]]
        if self.has_mask_branch:
            result.pred_masks = self.mean_masks(result)
            # Pastes the masks into the image.
            result = detector_postprocess(result, *result.image_size)
        return result

    def mean_masks(self, merged: Instances) -> Tensor:
        """Return the mask probabilities of merged boxes, (N, 1, S, S), the mean over the views."""
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
                (found,) = self.model.roi_heads.forward_with_given_boxes(features, [given])
            masks = found.pred_masks
            if is_mirrored(view[TRANSFORMS]):
                masks = masks.flip(-1)
            total = masks if total is None else total + masks
        assert total is not None
        return total / len(self.views)


class PanopticMerger:
    """Panoptic FPN's own combination of merged instances and merged semantic probabilities."""

    def __init__(self, model: nn.Module) -> None:
        names = ("overlap_thresh", "stuff_area_thresh", "instances_score_thresh")
        try:
            self.thresholds = [getattr(model, f"combine_{name}") for name in names]
        except AttributeError as error:
            raise ValueError(
                "Test-time augmentation of panoptic answers is for panoptic FPN: "
                f"{type(model).__name__} has no rule to combine things and stuff."
            ) from error

    def add(self, value: Any, view: Record) -> None:
        """Ignore the answer, which is made anew from those of the other tasks."""

    def result(self, merged: Mapping[str, Any], /) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the map of segment ids (H, W), and the segments."""
        classes = merged["sem_seg"].argmax(dim=0)
        ids, segments = combine_semantic_and_instance_outputs(
            merged["instances"], classes, *self.thresholds
        )
        return ids, segments


# In order: an answer may be made from those before it.
MERGERS: dict[str, Callable[[nn.Module], Merger]] = {
    "sem_seg": SemanticMerger,
    "instances": InstanceMerger,
    "panoptic_seg": PanopticMerger,
}


def is_mirrored(transforms: T.TransformList) -> bool:
    """Return whether an odd number of horizontal flips is among the transforms."""
    return sum(isinstance(t, T.HFlipTransform) for t in transforms.transforms) % 2 == 1


def unmirror(instances: Instances) -> Instances:
    """Return the instances of a mirrored image as they are in the image itself."""
    width = instances.image_size[1]
    fields = dict(instances.get_fields())
    x0, y0, x1, y1 = fields["pred_boxes"].tensor.unbind(dim=1)
    fields["pred_boxes"] = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    if "pred_masks" in fields:
        fields["pred_masks"] = fields["pred_masks"].flip(-1)
    return Instances(instances.image_size, **fields)


def suppression(model: nn.Module) -> tuple[float, int]:
    """Return the IoU threshold of a detector's suppression, and its detections per image.

    0.5 and 100, Detectron2's own, for models that do not say.
    """
    threshold, limit = 0.5, 100
    module: Any
    for module in model.modules():
        if hasattr(module, "test_nms_thresh"):
            names = ("test_topk_per_image", "max_detections_per_image")
            limits = [getattr(module, name) for name in names if hasattr(module, name)]
            return float(module.test_nms_thresh), int(limits[0]) if limits else limit
    return threshold, limit
