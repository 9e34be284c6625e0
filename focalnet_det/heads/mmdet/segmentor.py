"""Define a semantic segmentor with the inference of mmsegmentation."""

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
    """Detectron2's segmentor with mmsegmentation's padding and resizing.

    In evaluation, images are not padded, and logits are resized to the input first, then to the
    original image. The backbone must accept any size, as FocalNet does. The head may return logits
    at any resolution, as Detectron2's ``SemSegFPNHead`` does.

    Source: open-mmlab/mmsegmentation:mmseg/models/segmentors/encoder_decoder.py.
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
            train_size: (height, width), pixels, that training batches are padded to at least.
            window: (height, width), pixels, of sliding windows in evaluation; logits are averaged
                where windows overlap. None evaluates the whole image at once.
            window_stride: (vertical, horizontal) stride of the windows, pixels; None for two thirds
                of the window.
            input_format: channel order of the images, "RGB" or "BGR"; read by data loaders.
            parts: arguments of Detectron2's ``SemanticSegmentor``.
        Raises: ValueError if a size is negative, or the stride is not positive or larger than the
            window.
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
                    f"window_stride {self.window_stride} must be positive and at most the window "
                    f"{self.window}: pixels between windows would have no prediction."
                )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys of SemanticSegmentor and ``MODEL.SEGMENTOR``."""
        sizes = {key.lower(): value or None for key, value in cfg.MODEL.SEGMENTOR.items()}
        return {**super().from_config(cfg), **sizes, "input_format": cfg.INPUT.FORMAT}

    def forward(self, batched_inputs: Sequence[Record]) -> Any:
        """Predict logits, or compute losses in training.

        Args:
            batched_inputs: records with "image", (3, H, W), 0..255; in training "sem_seg", (H, W),
                int64; optionally "height" and "width" of the output, pixels.
        Returns: the losses in training; otherwise {"sem_seg": logits (K, H, W)} for each image.
        """
        if self.training:
            return self.losses(batched_inputs)
        return [{"sem_seg": self.segment(record)} for record in batched_inputs]

    def losses(self, batched_inputs: Sequence[Record]) -> dict[str, Tensor]:
        """Compute the losses of a batch; the padding is zero, and ignored in the labels."""
        images = [self.normalize_image(record["image"]) for record in batched_inputs]
        labels = [record["sem_seg"].to(self.device) for record in batched_inputs]
        divisor = max(self.backbone.size_divisibility, 1)
        batch = pad_and_stack_maps(images, self.train_size, divisor, 0.0)
        targets = pad_and_stack_maps(
            labels, self.train_size, divisor, self.sem_seg_head.ignore_value
        )
        with padded_batch([(image.shape[-2], image.shape[-1]) for image in images]):
            _, losses = self.sem_seg_head(self.backbone(batch), targets)
        return dict(losses)

    def segment(self, record: Record) -> Tensor:
        """Predict the logits (K, H, W) of one image, in the output size of its record."""
        image = self.normalize_image(record["image"]).unsqueeze(0)
        logits = (
            self.predict_logits(image)
            if self.window is None
            else self.slide_inference(image, *self.window)
        )
        size = (record.get("height", image.shape[2]), record.get("width", image.shape[3]))
        return resize_logits(logits, size)[0]

    def predict_logits(self, images: Tensor) -> Tensor:
        """Predict the logits of normalized images, (N, 3, H, W) -> (N, K, H, W), float32."""
        divisor = max(self.backbone.size_divisibility, 1)
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % divisor, 0, -height % divisor))
        with padded_batch([(height, width)] * len(images)):
            logits, _ = self.sem_seg_head(self.backbone(images))
        return resize_logits(logits.float(), images.shape[-2:])[..., :height, :width]

    def slide_inference(self, image: Tensor, height: int, width: int) -> Tensor:
        """Average the logits of overlapping windows, (1, 3, H, W) -> (1, K, H, W).

        The last window of a row or column is shifted back into the image.
        """
        total, count = None, image.new_zeros(image.shape[-2:])
        for top in window_starts(image.shape[-2], height, self.window_stride[0]):
            for left in window_starts(image.shape[-1], width, self.window_stride[1]):
                area = (..., slice(top, top + height), slice(left, left + width))
                logits = self.predict_logits(image[area])
                if total is None:
                    total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
                total[area] += logits
                count[area] += 1
        assert total is not None
        return total / count

    def normalize_image(self, image: Tensor) -> Tensor:
        """Move an image (3, H, W), 0..255, to the device of the model and normalize it."""
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std


def pad_and_stack_maps(
    tensors: Sequence[Tensor], least: Sequence[int], divisor: int, value: float
) -> Tensor:
    """Stack maps (..., H, W) of different sizes, padded at the right and the bottom.

    Args:
        tensors: one map per image.
        least: smallest height and width of the result, pixels.
        divisor: the height and width of the result are multiples of this, pixels.
        value: value of the padding.
    Returns: (N, ..., H', W').
    """
    height, width = (max(least[i], *(t.shape[i - 2] for t in tensors)) for i in (0, 1))
    height, width = (-(-side // divisor) * divisor for side in (height, width))
    return torch.stack(
        [F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors]
    )


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize logits bilinearly, (N, K, h, w) -> (N, K, H, W)."""
    size = (int(size[0]), int(size[1]))
    if tuple(logits.shape[-2:]) == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of the windows that cover a side, all in pixels.

    A window ends outside the image only if it is the only one.
    """
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
