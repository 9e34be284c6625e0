"""Compute the cross-entropy over the pixels of a label map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.checks import check_integer, check_number

AVERAGES = ("all", "valid")
# Label of pixels without a class in every data set of this package.
IGNORED_LABEL = 255


class PixelCrossEntropy(nn.Module):
    """Mean cross-entropy over pixels, with the logits resized to the labels.

    Args:
        ignore_value: label of pixels without a class.
        average: "all" divides by the number of pixels, ignored ones included, as the published
            recipes do; "valid" divides by the number of selected pixels (with class weights: by the
            sum of their weights).
        class_weights: a weight for each class, None for 1.
        ohem_threshold: with online hard example mining, select the pixels whose class has a
            probability below this; None selects all labeled pixels.
        ohem_min_kept: select at least this many of the hardest pixels per image of the batch.
    Raises: ValueError for an unknown ``average``, or a value that is out of range.
    Source: arXiv:1604.03540, section 3.2 (hard examples); open-mmlab/mmsegmentation:mmseg/models/
    losses/cross_entropy_loss.py and mmseg/structures/sampler/ohem_pixel_sampler.py.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        ignore_value: int = IGNORED_LABEL,
        average: str = "all",
        class_weights: Sequence[float] | None = None,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 100_000,
    ) -> None:
        super().__init__()
        if average not in AVERAGES:
            raise ValueError(f"Unknown average {average!r}. Known: {', '.join(AVERAGES)}.")
        for weight in class_weights or ():
            check_number("class_weights", weight, 0, 1e6)
        if ohem_threshold is not None:
            check_number("ohem_threshold", ohem_threshold, 0, 1)
        check_integer("ohem_min_kept", ohem_min_kept, 0, 2**31)
        self.ignore_value = ignore_value
        self.average = average
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        weights = (
            None
            if class_weights is None
            else torch.tensor([float(weight) for weight in class_weights])
        )
        self.register_buffer("class_weights", weights, persistent=False)

    def check_classes(self, num_classes: int) -> None:
        """Check that there is a class weight for each class, if there are any.

        Raises: ValueError if there are more or fewer.
        """
        weights = self.class_weights
        if weights is not None and len(weights) != num_classes:
            raise ValueError(
                f"The loss has {len(weights)} class weights for {num_classes} classes: give one "
                "per class."
            )

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: (N, K, h, w), at any resolution.
            labels: (N, H, W), int64, 0..K-1 or ``ignore_value``.
        Returns: a scalar, float32.
        """
        logits = F.interpolate(
            logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False
        )
        losses = F.cross_entropy(
            logits, labels, self.class_weights, ignore_index=self.ignore_value, reduction="none"
        )
        selected = labels != self.ignore_value
        if self.ohem_threshold is not None:
            selected = self._hard_pixels(logits.detach(), labels, selected)
        total = (losses * selected).sum()
        if self.average == "all":
            return total / labels.numel()
        if self.class_weights is None:
            return total / selected.sum().clamp(min=1)
        weights = self.class_weights[labels.where(selected, 0)] * selected
        return total / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    def _hard_pixels(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Select the hard pixels among the valid ones, (N, H, W), bool."""
        assert self.ohem_threshold is not None
        target = labels.where(valid, 0).unsqueeze(1)
        probability = logits.softmax(dim=1).gather(1, target).squeeze(1)
        ranked = probability[valid].sort().values
        if ranked.numel() == 0:
            return valid
        last = min(self.ohem_min_kept * len(labels), ranked.numel()) - 1
        # Not below: the last of the pixels to keep is selected too.
        return valid & ((probability < self.ohem_threshold) | (probability <= ranked[last]))
