"""Augment training images with simple copy-paste."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from .mappers import fit_boxes_to_masks

Sample = dict[str, Any]


@dataclass(frozen=True)
class CopyPaste:
    """Paste a random subset of another image's objects onto a training image.

    Both images are already augmented, preferably by large-scale jitter. Objects keep their
    position; parts outside the target are cut off. Target objects lose the pixels that are covered
    and are removed if none remain; the boxes of cut objects are recomputed from their masks.
    Crowds are neither pasted nor kept.

    Attributes:
        probability: of pasting onto an image, 0..1.
    Source: arXiv:2012.07177, section 3.
    """

    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"copy_paste must be a probability, 0..1, got {self.probability}.")

    def __call__(self, target: Sample, load_random: Callable[[], Sample]) -> Sample:
        """Paste objects onto a sample, or return it unchanged.

        Args:
            target: "image", uint8 (3, H, W), and "instances" with boxes and bitmap masks.
            load_random: returns another random sample.
        Raises: ValueError if the sample has semantic labels, which pasting would invalidate.
        """
        if "sem_seg" in target or "instances" not in target:
            raise ValueError("copy_paste supports instances only, not semantic labels.")
        if np.random.random() >= self.probability:
            return target
        source = load_random()
        count = len(source["instances"])
        if count == 0:
            return target
        chosen = np.random.permutation(count)[: np.random.randint(1, count + 1)]
        return paste(target, source, torch.as_tensor(np.sort(chosen)))


def paste(target: Sample, source: Sample, chosen: torch.Tensor) -> Sample:
    """Return a copy of the target with objects of the source pasted onto it.

    Args:
        target, source: "image", (3, H, W) each, sizes may differ; "instances" with boxes (xyxy,
            absolute pixels) and bitmap masks.
        chosen: indices of the source objects to paste, int64 (K,).
    """
    image = target["image"].clone()
    height, width = (
        min(a, b) for a, b in zip(image.shape[1:], source["image"].shape[1:], strict=True)
    )
    objects = source["instances"][chosen]
    masks = torch.zeros(len(objects), *image.shape[1:], dtype=torch.bool)
    masks[:, :height, :width] = objects.gt_masks.tensor[:, :height, :width]
    covered = masks.any(dim=0)
    area = covered[:height, :width]
    image[:, :height, :width][:, area] = source["image"][:, :height, :width][:, area]
    before = target["instances"]
    all_masks = torch.cat([before.gt_masks.tensor & ~covered, masks])
    classes = torch.cat([before.gt_classes, objects.gt_classes])
    visible = all_masks.flatten(1).any(dim=1)
    visible_masks = BitMasks(all_masks[visible])
    is_cut = torch.cat(
        [
            (before.gt_masks.tensor & covered).flatten(1).any(dim=1),
            masks.flatten(1).sum(dim=1) < objects.gt_masks.tensor.flatten(1).sum(dim=1),
        ]
    )
    all_boxes = torch.cat([before.gt_boxes.tensor, objects.gt_boxes.tensor])
    boxes = Boxes(fit_boxes_to_masks(all_boxes[visible], visible_masks, is_cut[visible]))
    instances = Instances(
        before.image_size, gt_boxes=boxes, gt_classes=classes[visible], gt_masks=visible_masks
    )
    return {**target, "image": image, "instances": instances}
