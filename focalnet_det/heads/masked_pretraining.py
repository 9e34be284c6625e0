"""Pretrain by masked image modeling as a Detectron2 model."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones.masked_images import MaskedImageModel, MaskGenerator, masked_l1
from ..backbones.stages import StagedBackbone
from .image_classifier import IMAGENET_MEAN, IMAGENET_STD, Record, normalized_batch


class MaskedPretraining(MaskedImageModel):
    """Masked image model with Detectron2's interface: losses in training, pictures in evaluation.

    In evaluation, the mask of an image depends on the name of its file alone.

    Args:
        backbone: without output norms.
        mask_unit: side of the masked squares, pixels.
        mask_ratio: share of them that is masked, 0..1.
        pixel_mean, pixel_std: per channel, 0..255.
        input_format: order of channels of the images, "RGB" or "BGR".
    Source: arXiv:2111.09886; microsoft/SimMIM for the defaults.
    """

    def __init__(
        self,
        *,
        backbone: StagedBackbone,
        mask_unit: int = 32,
        mask_ratio: float = 0.6,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        input_format: str = "RGB",
    ) -> None:
        super().__init__(backbone)
        self.generate = MaskGenerator(unit=mask_unit, ratio=mask_ratio)
        self.input_format = input_format
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    def forward(self, batched_inputs: Any, mask: Tensor | None = None) -> Any:
        """Compute the loss, or reconstruct each image.

        Args:
            batched_inputs: a list of {"image": (C, H, W), 0..255, "file_name": str}; or a tensor of
                normalized images, with its mask, as :class:`MaskedImageModel` takes them.
            mask: of a tensor.
        Returns: {"loss_mim": loss} in training; in evaluation [{"masked_image": {"loss": of this
            image, "image", "masked", "reconstruction": uint8 (C, H, W)}}].
        Raises: ValueError if the images have different sizes.
        """
        if isinstance(batched_inputs, Tensor):
            assert mask is not None, "a tensor of images needs its mask"
            return super().forward(batched_inputs, mask)
        images = normalized_batch(self, batched_inputs)
        mask = torch.stack([self._mask(images, x) for x in batched_inputs]).to(images.device)
        pixels = self.pixel_mask(mask, images.shape[2], images.shape[3])
        reconstruction = super().forward(images, mask)
        if self.training:
            return {"loss_mim": masked_l1(reconstruction, images, pixels)}
        return [
            {"masked_image": self._picture(images[i], reconstruction[i], pixels[i])}
            for i in range(len(images))
        ]

    def _mask(self, images: Tensor, record: Record) -> Tensor:
        """Draw the mask of an image, in patches of the stem."""
        height, width = images.shape[2:]
        generator = None
        if not self.training:
            name = str(record.get("file_name", "")).replace("\\", "/").rpartition("/")[2]
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = self.generate(height, width, self.patch_size, generator)
        rows, columns = self.mask_shape(height, width)
        # Units and strides may reach beyond the image by different amounts.
        whole = torch.zeros(rows, columns, dtype=torch.bool)
        part = drawn[:rows, :columns]
        whole[: part.shape[0], : part.shape[1]] = part
        return whole

    def _picture(self, image: Tensor, reconstruction: Tensor, pixels: Tensor) -> dict[str, Any]:
        loss = masked_l1(reconstruction[None], image[None], pixels[None])
        merged = torch.where(pixels, reconstruction.float(), image)
        return {
            "loss": float(loss),
            "image": self._to_uint8(image),
            # Normalized 0 is the mean color.
            "masked": self._to_uint8(torch.where(pixels, 0.0, image)),
            "reconstruction": self._to_uint8(merged),
        }

    def _to_uint8(self, image: Tensor) -> Tensor:
        values = image * self.pixel_std + self.pixel_mean
        return values.round().clamp(0, 255).to(torch.uint8).cpu()
