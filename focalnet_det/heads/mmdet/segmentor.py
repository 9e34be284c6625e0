"""Semantic segmentation with the inference of the published results."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor
from torch import Tensor
from torch.nn import functional as F

from ...layers.checks import check_integers
from ...layers.padded_batch import padded_batch

Record = Mapping[str, Any]


@META_ARCH_REGISTRY.register()
class MmsegSegmentor(SemanticSegmentor):
    """Detectron2's segmentor with mmsegmentation's sizes.

    In evaluation an image is not padded: its logits go to the size of the input first, and to
    that of the original image then. The backbone must take any size, as FocalNet does.

    The head returns logits at any resolution: Detectron2's ``SemSegFPNHead`` fits as well.
    """

    @configurable
    def __init__(
        self,
        *,
        train_size: tuple[int, int] | None = None,
        window: tuple[int, int] | None = None,
        window_stride: tuple[int, int] | None = None,
        input_format: str = "RGB",
        **parts: Any,
    ) -> None:
        """Build the segmentor.

        Args:
            train_size: smallest (height, width), pixels, that training batches are padded to.
            window: (height, width), pixels, of the windows that an image is evaluated in; where
                they overlap, logits are averaged. None evaluates the whole image at once.
            window_stride: between two windows, pixels; None for two thirds of the window.
            input_format: channel order, for those that make the inputs.
            parts: of Detectron2's ``SemanticSegmentor``.
        Raises: ValueError if a size is negative, or the stride is larger than the window or not
            positive.
        """
        super().__init__(**parts)
        for name, size in (("train_size", train_size), ("window", window)):
            check_integers(name, size or (), 1 if name == "window" else 0, 100_000)
        self.train_size = tuple(train_size or (0, 0))
        self.input_format = input_format
        self.window = None if window is None else (window[0], window[1])
        if self.window is not None:
            strides = window_stride or [max(1, side * 2 // 3) for side in self.window]
            self.window_stride = (strides[0], strides[1])
            if not all(0 < s <= w for s, w in zip(self.window_stride, self.window, strict=True)):
                raise ValueError(
                    f"window_stride {self.window_stride} must be positive and at most the window, "
                    f"{self.window}: pixels between windows would have no prediction."
                )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys of SemanticSegmentor and ``MODEL.SEGMENTOR``."""
        own = {key.lower(): value or None for key, value in cfg.MODEL.SEGMENTOR.items()}
        return {**super().from_config(cfg), **own, "input_format": cfg.INPUT.FORMAT}

    def forward(self, batched_inputs: Sequence[Record]) -> Any:
        """Return losses in training, else logits.

        Args:
            batched_inputs: "image", (3, H, W); in training "sem_seg", (H, W); "height", "width" of
                the wanted output.
        Returns: the losses in training; otherwise for each image {"sem_seg": logits (K, H, W)}.
        """
        if self.training:
            return self.losses(batched_inputs)
        return [{"sem_seg": self.segment(record)} for record in batched_inputs]

    def losses(self, batched_inputs: Sequence[Record]) -> dict[str, Tensor]:
        """Return the losses of a batch, padded with zeros and with labels to be ignored."""
        images = [self.normalized(record["image"]) for record in batched_inputs]
        labels = [record["sem_seg"].to(self.device) for record in batched_inputs]
        divisor = max(self.backbone.size_divisibility, 1)
        batch = padded(images, self.train_size, divisor, 0.0)
        targets = padded(labels, self.train_size, divisor, self.sem_seg_head.ignore_value)
        with padded_batch([(image.shape[-2], image.shape[-1]) for image in images]):
            _, losses = self.sem_seg_head(self.backbone(batch), targets)
        return dict(losses)

    def segment(self, record: Record) -> Tensor:
        """Return the logits (K, H, W) of one image, at the size that the record asks for."""
        image = self.normalized(record["image"]).unsqueeze(0)
        logits = self.logits(image) if self.window is None else self.slide(image, *self.window)
        size = (record.get("height", image.shape[2]), record.get("width", image.shape[3]))
        return resized_to(logits, size)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of normalized images, (N, 3, H, W) -> (N, K, H, W), float."""
        divisor = max(self.backbone.size_divisibility, 1)
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % divisor, 0, -height % divisor))
        with padded_batch([(height, width)] * len(images)):
            logits, _ = self.sem_seg_head(self.backbone(images))
        return resized_to(logits.float(), images.shape[-2:])[..., :height, :width]

    def slide(self, image: Tensor, height: int, width: int) -> Tensor:
        """Return the mean logits of overlapping windows, (1, 3, H, W) -> (1, K, H, W).

        The last window of a row or column is moved back into the image.
        """
        total, count = None, image.new_zeros(image.shape[-2:])
        for top in starts(image.shape[-2], height, self.window_stride[0]):
            for left in starts(image.shape[-1], width, self.window_stride[1]):
                area = (..., slice(top, top + height), slice(left, left + width))
                logits = self.logits(image[area])
                if total is None:
                    total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
                total[area] += logits
                count[area] += 1
        assert total is not None
        return total / count

    def normalized(self, image: Tensor) -> Tensor:
        """Move an image (3, H, W), 0..255, to the model's device and normalize it."""
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std


def padded(tensors: Sequence[Tensor], least: Sequence[int], divisor: int, value: float) -> Tensor:
    """Stack maps (..., H, W) of different sizes, padded at the right and the bottom.

    Args:
        least: smallest height and width of the result.
        divisor: of both.
    """
    height, width = (max(least[i], *(t.shape[i - 2] for t in tensors)) for i in (0, 1))
    height, width = (-(-side // divisor) * divisor for side in (height, width))
    return torch.stack(
        [F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors]
    )


def resized_to(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize logits bilinearly, (N, K, h, w) -> (N, K, H, W)."""
    size = (int(size[0]), int(size[1]))
    if tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along a side: they cover it, and only a lone one ends outside."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
