"""Sparse R-CNN as a Detectron2 meta-architecture."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...compat import make_image_list
from ...layers.checks import check_integer, check_number
from ...ops.focal_block.policy import without_autocast
from ..mmdet.conventions import MmdetBox2BoxTransform
from ..mmdet.rcnn import rescale_to_original
from ..poolers import FastROIPooler
from ..segmentors import PIXEL_MEAN, PIXEL_STD
from ..set_prediction.box_matching import BoxTarget, BoxWeights
from .dynamic_stage import DynamicStage, initial_boxes
from .sparse_criterion import SparseCriterion, StagePrediction

Record = Mapping[str, Any]
# One over the standard deviations of dx, dy, dw, dh.
DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)


class DynamicHead(nn.Module):
    """Stages that refine boxes and proposal features, each with weights of its own.

    Args:
        box_pooler: RoIAlign from the levels of the neck.
        stages: of equal sizes.
    Source: arXiv:2011.12450, section 3.1 (iterative structure).
    """

    def __init__(self, box_pooler: nn.Module, stages: Sequence[DynamicStage]) -> None:
        super().__init__()
        self.box_pooler = box_pooler
        self.head_series = nn.ModuleList(stages)
        self.box2box_transform = MmdetBox2BoxTransform(DELTA_WEIGHTS)

    def forward(
        self, levels: Sequence[Tensor], boxes: Tensor, features: Tensor
    ) -> list[StagePrediction]:
        """Return the predictions of all stages.

        Args:
            levels: maps of the neck, (N, C, H, W) each.
            boxes: (N, Q, 4), initial boxes, xyxy, absolute pixels.
            features: (N, Q, C), initial proposal features.
        """
        predictions: list[StagePrediction] = []
        for stage in self.head_series:
            rois = self.box_pooler(list(levels), [Boxes(own.detach()) for own in boxes])
            logits, deltas, features = stage(features, rois)
            # Half precision would round boxes to whole pixels.
            with without_autocast(deltas):
                decoded = self.box2box_transform.apply_deltas(
                    deltas.flatten(0, 1).float(), boxes.flatten(0, 1).float()
                )
            predictions.append(StagePrediction(logits, decoded.view_as(boxes), features))
            boxes = predictions[-1].boxes.detach()
        return predictions


@META_ARCH_REGISTRY.register()
class SparseRCNN(nn.Module):
    """Backbone with FPN, learned proposals, dynamic head and losses.

    Source: arXiv:2011.12450. Boxes, matching and inference are those of mmdet, with which the
    results of FocalNet and Focal Transformer were made.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: DynamicHead,
        criterion: SparseCriterion,
        in_features: Sequence[str],
        proposals: int = 300,
        initial_box: str = "image",
        max_detections_per_image: int = 300,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
        input_format: str = "RGB",
    ) -> None:
        """Build the model.

        Args:
            backbone: with a neck whose levels have equal channels.
            in_features: levels to pool from, fine to coarse.
            proposals: Q, boxes of an image.
            initial_box: see `initial_boxes`.
            max_detections_per_image: pairs of proposal and class that are returned.
            pixel_mean, pixel_std: 0..255, in the order of ``input_format``.
        Raises: ValueError for values out of range, or levels that the backbone does not have.
        """
        super().__init__()
        check_integer("proposals", proposals, 1, 65_536)
        check_integer("max_detections_per_image", max_detections_per_image, 1, 1_000_000)
        self.in_features = list(in_features)
        channels = level_channels(backbone, self.in_features)
        self.backbone, self.head, self.criterion = backbone, head, criterion
        self.init_proposal_boxes = nn.Embedding(proposals, 4)
        self.init_proposal_features = nn.Embedding(proposals, channels)
        with torch.no_grad():
            self.init_proposal_boxes.weight.copy_(initial_boxes(proposals, initial_box))
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.SPARSE_RCNN``, and levels, classes and RoIAlign from Detectron2's keys."""
        own, backbone = cfg.MODEL.SPARSE_RCNN, build_backbone(cfg)
        levels, roi = cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.ROI_BOX_HEAD
        parts = build_parts(
            backbone,
            levels,
            num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            stages=own.STAGES,
            dynamic_channels=own.DYNAMIC_CHANNELS,
            feedforward=own.FEEDFORWARD,
            heads=own.HEADS,
            resolution=roi.POOLER_RESOLUTION,
            sampling_ratio=roi.POOLER_SAMPLING_RATIO,
            weights=(own.CLASS_WEIGHT, own.L1_WEIGHT, own.GIOU_WEIGHT),
        )
        return {
            "backbone": backbone,
            "in_features": levels,
            **parts,
            "proposals": own.PROPOSALS,
            "initial_box": own.INITIAL_BOX,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[Record]) -> Any:
        """Return losses in training, else detections.

        Args:
            batched_inputs: "image", (3, H, W), 0..255; in training "instances" with "gt_boxes" and
                "gt_classes"; "height", "width" of the wanted output.
        Returns: the losses in training; otherwise "instances" for each image, in the original
            image, neither clipped nor filtered, as in mmdet.
        """
        images = [
            (record["image"].to(self.device) - self.pixel_mean) / self.pixel_std
            for record in batched_inputs
        ]
        sizes = self.pixel_mean.new_tensor(
            [[x.shape[-1], x.shape[-2], x.shape[-1], x.shape[-2]] for x in images]
        )
        stages = self.predict(make_image_list(images, self.backbone.size_divisibility), sizes)
        if self.training:
            targets = [self._target(record) for record in batched_inputs]
            losses: dict[str, Tensor] = self.criterion(stages, targets, sizes)
            return losses
        results = []
        for i, record in enumerate(batched_inputs):
            image_size = (images[i].shape[-2], images[i].shape[-1])
            found = self.detections(stages[-1].logits[i], stages[-1].boxes[i], image_size)
            found = rescale_to_original(found, record.get("height"), record.get("width"))
            results.append({"instances": found})
        return results

    def predict(self, images: Any, sizes: Tensor) -> list[StagePrediction]:
        """Return the predictions of all stages.

        Args:
            images: Detectron2's ``ImageList`` of normalized images.
            sizes: (N, 4): width, height, width, height of the images without padding, pixels.
        """
        features = self.backbone(images.tensor)
        levels = [features[name] for name in self.in_features]
        stages: list[StagePrediction] = self.head(
            levels,
            self.proposal_boxes(sizes),
            self.init_proposal_features.weight.expand(len(sizes), -1, -1),
        )
        return stages

    def proposal_boxes(self, sizes: Tensor) -> Tensor:
        """Return the initial boxes in images of given sizes (N, 4), (N, Q, 4), xyxy, pixels."""
        relative = box_convert(self.init_proposal_boxes.weight.float(), "cxcywh", "xyxy")
        return relative * sizes[:, None]

    def _target(self, record: Record) -> BoxTarget:
        truth = record["instances"]
        height, width = truth.image_size
        boxes = truth.gt_boxes.tensor.to(self.device)
        return BoxTarget(
            truth.gt_classes.to(self.device),
            boxes / boxes.new_tensor([width, height, width, height]),
            str(record.get("file_name", "without a file name")),
        )

    def detections(self, logits: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Instances:
        """Return the most probable pairs of proposal and class of an image.

        Args:
            logits: (Q, K).
            boxes: (Q, 4), xyxy, absolute pixels.
            image_size: (height, width), pixels.
        """
        probabilities = logits.float().sigmoid().flatten()
        count = min(self.max_detections_per_image, len(probabilities))
        scores, pairs = probabilities.topk(count)
        classes = logits.shape[1]
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes[torch.div(pairs, classes, rounding_mode="floor")]),
            scores=scores,
            pred_classes=pairs % classes,
        )


def level_channels(backbone: Backbone, levels: Sequence[str]) -> int:
    """Return the channels that all levels have.

    Raises: ValueError if a level is unknown, or the channels differ.
    """
    shapes = backbone.output_shape()
    unknown = [name for name in levels if name not in shapes]
    if unknown or not levels:
        raise ValueError(
            f"Sparse R-CNN reads levels {', '.join(levels) or '(none)'}, the backbone gives "
            f"{', '.join(shapes)}: change in_features."
        )
    channels = {shapes[name].channels for name in levels}
    if len(channels) > 1:
        raise ValueError(
            "Sparse R-CNN needs levels of equal channels, as an FPN gives them; got "
            f"{', '.join(f'{name}: {shapes[name].channels}' for name in levels)}."
        )
    return int(channels.pop())


def build_parts(
    backbone: Backbone,
    in_features: Sequence[str],
    *,
    num_classes: int,
    stages: int = 6,
    dynamic_channels: int = 64,
    feedforward: int = 2048,
    heads: int = 8,
    resolution: int = 7,
    sampling_ratio: int = 2,
    canonical_box_size: int = 224,
    weights: BoxWeights | Sequence[float] = BoxWeights(),  # noqa: B008
) -> dict[str, Any]:
    """Build head and losses for the levels of a backbone with FPN.

    Args:
        dynamic_channels, feedforward, heads: of `DynamicStage`.
        resolution, sampling_ratio: of RoIAlign.
        canonical_box_size: side of the boxes that are pooled at stride 16, pixels.
        weights: of `SparseCriterion`.
    Raises: ValueError for values out of range.
    """
    check_integer("num_classes", num_classes, 1, 65_536)
    check_integer("stages", stages, 1, 100)
    check_integer("resolution", resolution, 1, 256)
    check_number("canonical_box_size", canonical_box_size, 1, 1e6)
    channels = level_channels(backbone, in_features)
    if channels % heads:
        raise ValueError(f"{channels} channels cannot be split over {heads} heads: change heads.")
    shapes = backbone.output_shape()
    pooler = FastROIPooler(
        output_size=resolution,
        scales=[1 / shapes[name].stride for name in in_features],
        sampling_ratio=sampling_ratio,
        pooler_type="ROIAlignV2",
        canonical_box_size=canonical_box_size,
    )
    series = [
        DynamicStage(
            num_classes,
            channels,
            dynamic_channels=dynamic_channels,
            resolution=resolution,
            heads=heads,
            feedforward=feedforward,
        )
        for _ in range(stages)
    ]
    return {"head": DynamicHead(pooler, series), "criterion": SparseCriterion(weights)}


HEAD_OPTIONS = (
    *("stages", "dynamic_channels", "feedforward", "heads", "resolution", "sampling_ratio"),
    *("canonical_box_size", "weights"),
)


def sparse_rcnn(
    *,
    backbone: Backbone,
    num_classes: int,
    in_features: Sequence[str] = ("p2", "p3", "p4", "p5"),
    **options: Any,
) -> SparseRCNN:
    """Build Sparse R-CNN on a backbone with FPN: channels and strides are read from it.

    Args:
        options: of `build_parts` and of `SparseRCNN`.
    Raises: TypeError for an unknown option, ValueError for a value out of range.
    """
    head = {name: options.pop(name) for name in HEAD_OPTIONS if name in options}
    parts = build_parts(backbone, in_features, num_classes=num_classes, **head)
    return SparseRCNN(backbone=backbone, in_features=in_features, **parts, **options)
