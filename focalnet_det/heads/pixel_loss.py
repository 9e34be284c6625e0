"""Cross-entropy over the pixels of a label map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.checks import check_integer, check_number

DENOMINATORS = ("all", "valid")
# Label of pixels without a class, in every data set here.
IGNORED_LABEL = 255


class PixelCrossEntropy(nn.Module):
    """Mean cross-entropy of the pixels, after the logits are resized to the labels.

    Args:
        ignore_value: label of pixels that have no class.
        average: "all" divides by the number of pixels, ignored ones included, as the published
            recipes do; "valid" divides by the number of pixels that count (with class weights: by
            the sum of their weights).
        class_weights: a factor for each class, None for 1.
        ohem_threshold: with online hard example mining, a pixel counts if its class has a
            probability below this; None counts all.
        ohem_min_kept: but at least this many hardest pixels per image of the batch.
    Raises: ValueError for an unknown ``average``, or another value that is out of range.
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
        if average not in DENOMINATORS:
            raise ValueError(f"Unknown average {average!r}. Known: {', '.join(DENOMINATORS)}.")
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

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: (N, K, h, w), any size.
            labels: int64 (N, H, W), 0..K-1 or ``ignore_value``.
        """
        logits = F.interpolate(
            logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False
        )
        losses = F.cross_entropy(
            logits, labels, self.class_weights, ignore_index=self.ignore_value, reduction="none"
        )
        counted = labels != self.ignore_value
        if self.ohem_threshold is not None:
            counted = self._hard(logits.detach(), labels, counted)
        total = (losses * counted).sum()
        if self.average == "all":
            return total / labels.numel()
        if self.class_weights is None:
            return total / counted.sum().clamp(min=1)
        weights = self.class_weights[labels.where(counted, 0)] * counted
        return total / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    def _hard(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Return which of the valid pixels count."""
        assert self.ohem_threshold is not None
        own = logits.softmax(dim=1).gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1)
        ranked = own[valid].sort().values
        if ranked.numel() == 0:
            return valid
        last = min(self.ohem_min_kept * len(labels), ranked.numel()) - 1
        # The pixel at the boundary counts too.
        return valid & ((own < self.ohem_threshold) | (own <= ranked[last]))
