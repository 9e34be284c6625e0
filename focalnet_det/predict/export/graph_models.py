"""Wrap models so that a graph of them can be recorded: tensors in, tensors out, any image size."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...heads.mask2former.mask2former import Mask2Former
from ...heads.mmdet.segmentor import MmsegSegmentor
from ...layers.recast import replace_modules

Maps = Mapping[str, Tensor]


class GraphAveragePool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling as two matrix products: ONNX has no such layer for any size."""

    def forward(self, x: Tensor) -> Tensor:
        """Average (N, C, H, W) over a grid of ``output_size`` cells a side."""
        cells: Any = self.output_size
        cells = cells if isinstance(cells, tuple) else (cells, cells)
        rows, columns = (
            averaging_matrix(*pair, x) for pair in zip(cells, x.shape[-2:], strict=True)
        )
        return rows @ x @ columns.transpose(0, 1)


def averaging_matrix(cells: int, length: int, like: Tensor) -> Tensor:
    """Return the weights (cells, length) of ``length`` values in the averages of cells.

    Cell i covers the values from floor(i * length / cells) to ceil((i + 1) * length / cells).
    """
    numbers = torch.arange(cells, device=like.device)[:, None]
    starts, ends = numbers * length // cells, ((numbers + 1) * length + cells - 1) // cells
    positions = torch.arange(length, device=like.device)
    inside = (positions >= starts) & (positions < ends)
    return inside.to(like.dtype) / (ends - starts)


# Layers that graphs for any size cannot hold, and those that stand in for them.
REPLACED: dict[type[nn.Module], type[nn.Module]] = {nn.AdaptiveAvgPool2d: GraphAveragePool}


class GraphModel(nn.Module):
    """A model whose graph can be recorded.

    Attributes:
        model: a copy of the original, with layers replaced that graphs cannot hold.
        outputs: names of the results of `forward`, in their order.
        has_threshold: whether `forward` also takes the least score of detections, 0..1, ().
        reverse_channels: whether the model wants BGR. The graph always takes RGB.
        channels: of the images.
    """

    has_threshold: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = replace_modules(copy.deepcopy(model), REPLACED)
        self.outputs: tuple[str, ...] = ()
        self.reverse_channels = getattr(model, "input_format", "RGB") == "BGR"
        # A backbone has no statistics of pixels; its stem is its first convolution.
        stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        mean = getattr(model, "pixel_mean", None)
        self.channels: int = stem.in_channels if mean is None else mean.numel()

    def normalized(self, images: Tensor) -> Tensor:
        """Normalize images (N, C, H, W), RGB, 0..255, with the statistics of the model."""
        if self.reverse_channels:
            images = images.flip(1)
        return (images - self.model.pixel_mean) / self.model.pixel_std

    def padded_features(self, images: Tensor) -> Maps:
        """Compute the features of normalized images, padded as Detectron2 pads a batch."""
        divisor = max(self.model.backbone.size_divisibility, 1)
        features: Maps = self.model.backbone(pad_to_divisor(images, divisor))
        return features


def pad_to_divisor(images: Tensor, divisor: int) -> Tensor:
    """Zero-pad (N, C, H, W) at the right and bottom to a multiple of ``divisor`` pixels."""
    height, width = images.shape[-2:]
    # Written so that the sizes of all feature maps follow from one number when a graph is recorded.
    bottom = (height + divisor - 1) // divisor * divisor - height
    right = (width + divisor - 1) // divisor * divisor - width
    return F.pad(images, (0, right, 0, bottom))


class GraphBackbone(GraphModel):
    """A backbone, or the backbone of a model alone: normalized images in, feature maps out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.outputs = tuple(self.model.output_shape())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map normalized images (N, C, H, W) to the features (N, C', ceil(H / stride), ...)."""
        features = self.model(images)
        return tuple(features[name] for name in self.outputs)


class GraphSegmentor(GraphModel):
    """UPerNet or semantic FPN."""

    def __init__(self, model: MmsegSegmentor) -> None:
        super().__init__(model)
        if model.window is not None:
            raise ValueError(
                "A model with sliding windows cannot be exported: set model.window=null, and cut "
                "images into windows outside the graph."
            )
        self.outputs = ("logits",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (N, C, H, W), RGB, 0..255, to logits (N, K, H, W).

        Source: :meth:`MmsegSegmentor.predict_logits`, which turns sizes into numbers.
        """
        height, width = images.shape[-2:]
        divisor = max(self.model.backbone.size_divisibility, 1)
        padded = pad_to_divisor(self.normalized(images), divisor)
        logits, _ = self.model.sem_seg_head(self.model.backbone(padded))
        logits = F.interpolate(
            logits.float(), size=padded.shape[-2:], mode="bilinear", align_corners=False
        )
        return (logits[..., :height, :width],)


class GraphMask2Former(GraphModel):
    """Mask2Former before its results are made of the queries."""

    def __init__(self, model: Mask2Former) -> None:
        super().__init__(model)
        self.outputs = ("class_logits", "mask_logits")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (N, C, H, W) to class logits (N, Q, K + 1) and mask logits (N, Q, h, w).

        The masks have stride 4, and cover the image padded to a multiple of 32 pixels.
        """
        padded = pad_to_divisor(self.normalized(images), self.model.size_divisibility)
        prediction = self.model.sem_seg_head(self.model.backbone(padded))[-1]
        return prediction.class_logits, prediction.mask_logits()
