"""Simple copy-paste: objects of one training image pasted onto another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from .mappers import follow_masks

Example = dict[str, Any]


@dataclass(frozen=True)
class CopyPaste:
    """Pastes a random subset of another image's objects, in their place, onto a training example.

    Both images are augmented already, best by large-scale jitter. Where they differ in size, what
    lies outside the target is cut off. Objects of the target lose the pixels that are pasted over,
    and those without any left are dropped; the boxes of objects that were cut follow their masks.
    Crowds are no objects of either image; an image without objects gives nothing, and can be pasted
    onto.

    Attributes:
        probability: that an example is changed, 0..1.
    Source: arXiv:2012.07177, section 3.
    """

    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"copy_paste is a probability, 0..1, got {self.probability}.")

    def __call__(self, target: Example, draw: Callable[[], Example]) -> Example:
        """Args:
            target: with "image", (3, H, W), and "instances" with boxes and bitmap masks.
            draw: gives another example at random.
        Raises: ValueError if the example has semantic labels, which would not be right any more.
        """
        if "sem_seg" in target or "instances" not in target:
            raise ValueError("copy_paste is for instances with masks alone: no semantic labels.")
        if np.random.random() >= self.probability:
            return target
        source = draw()
        count = len(source["instances"])
        if count == 0:
            return target
        chosen = np.random.permutation(count)[: np.random.randint(1, count + 1)]
        return paste(target, source, torch.as_tensor(np.sort(chosen)))


def paste(target: Example, source: Example, chosen: torch.Tensor) -> Example:
    """The target with the chosen objects of the source, (K,) indices, on it; a new example."""
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
    every = torch.cat([before.gt_masks.tensor & ~covered, masks])
    classes = torch.cat([before.gt_classes, objects.gt_classes])
    visible = every.flatten(1).any(dim=1)
    kept = BitMasks(every[visible])
    cut = torch.cat(
        [
            (before.gt_masks.tensor & covered).flatten(1).any(dim=1),
            masks.flatten(1).sum(dim=1) < objects.gt_masks.tensor.flatten(1).sum(dim=1),
        ]
    )
    whole = torch.cat([before.gt_boxes.tensor, objects.gt_boxes.tensor])
    boxes = Boxes(follow_masks(whole[visible], kept, cut[visible]))
    instances = Instances(
        before.image_size, gt_boxes=boxes, gt_classes=classes[visible], gt_masks=kept
    )
    return {**target, "image": image, "instances": instances}
