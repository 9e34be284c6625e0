"""Train and evaluate classifiers as Detectron2 models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.classifier import Classifier
from ..backbones.stages import StagedBackbone
from ..compat import require_timm

Record = Mapping[str, Any]
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def normalized_batch(model: Any, inputs: Sequence[Record]) -> Tensor:
    """Return the images of a batch as one normalized tensor, (N, C, H, W).

    Args:
        model: with ``pixel_mean`` and ``pixel_std``, (C, 1, 1).
        inputs: with "image", (C, H, W), 0..255.
    Raises: ValueError if the images have different sizes.
    """
    images = [x["image"].to(model.pixel_mean.device) for x in inputs]
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"The images of a batch must have one size, got {sorted(sizes)}: crop them "
            "(dataloader.*.augmentations)."
        )
    return (torch.stack(images).float() - model.pixel_mean) / model.pixel_std


class ImageClassifier(Classifier):
    """Classifier with Detectron2's interface: losses in training, scores in evaluation.

    Mixup, CutMix and random erasing are timm's, on whole batches, in this order of the official
    recipe: erasing, then mixing.

    Args:
        backbone: without output norms.
        num_classes: number of logits.
        label_smoothing: share of the target that is spread over all classes, 0..1.
        mixup, cutmix: alpha of the Beta distribution of the mixing factor, 0 for none.
        mix_probability: of mixing a batch at all.
        erasing: probability of erasing a rectangle of an image.
        pixel_mean, pixel_std: per channel, 0..255.
        input_format: order of channels of the images, "RGB" or "BGR".
    Source: microsoft/FocalNet:config.py (AUG) and data/build.py; the losses are the cross entropies
    of its main.py, which takes soft targets where batches are mixed.
    """

    def __init__(
        self,
        *,
        backbone: StagedBackbone,
        num_classes: int,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        erasing: float = 0.0,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        input_format: str = "RGB",
    ) -> None:
        super().__init__(backbone, num_classes)
        self.label_smoothing = label_smoothing
        self.input_format = input_format
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.mix: Any = None
        self.erase: Any = None
        if mixup or cutmix:
            self.mix = require_timm("data").Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mix_probability,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        if erasing:
            erase = require_timm("data.random_erasing").RandomErasing
            self.erase = erase(erasing, mode="pixel", device="cpu")

    @property
    def mixes(self) -> bool:
        """Tell whether batches are mixed, which needs an even number of images."""
        return self.mix is not None

    def forward(self, batched_inputs: Any) -> Any:
        """Compute the loss, or the scores of each image.

        Args:
            batched_inputs: a list of {"image": (C, H, W), 0..255, "label": int}; or a tensor of
                normalized images, (N, C, H, W), as :class:`Classifier` takes it.
        Returns: {"loss_cls": loss} in training; [{"class_scores": logits, (K,)}] in evaluation;
            logits, (N, K), for a tensor.
        Raises: ValueError if images have different sizes, or mixing gets an odd number of them.
        """
        if isinstance(batched_inputs, Tensor):
            return super().forward(batched_inputs)
        images = normalized_batch(self, batched_inputs)
        if not self.training:
            logits = super().forward(images)
            return [{"class_scores": scores} for scores in logits]
        labels = torch.tensor([x["label"] for x in batched_inputs], device=images.device)
        images, target = self._augment(images, labels)
        logits = super().forward(images)
        # Mixed targets are smoothed already.
        smoothing = 0.0 if self.mixes else self.label_smoothing
        return {"loss_cls": F.cross_entropy(logits.float(), target, label_smoothing=smoothing)}

    def _augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erase and mix a batch; targets are labels, (N,), or shares of classes, (N, K)."""
        if self.erase is not None:
            self.erase.device = images.device
            images = self.erase(images)
        if not self.mixes:
            return images, labels
        if len(images) % 2:
            raise ValueError(
                f"Mixup and CutMix need an even number of images in a process, got {len(images)}."
            )
        images, target = self.mix(images, labels)
        return images, target
