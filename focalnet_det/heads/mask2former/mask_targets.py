"""From the labels of records to the segments that Mask2Former learns."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from detectron2.structures import BitMasks
from torch import Tensor

from .mask_matcher import Target

# Label of pixels without a class.
IGNORE = 255


def make_target(
    record: Mapping[str, Any],
    *,
    things: Collection[int] | None,
    ignore_unlabeled: bool,
    device: torch.device,
) -> Target:
    """Return the segments of a record: an object each, and a class of stuff each.

    Args:
        record: "sem_seg", int64 (H, W), classes and 255; "instances" with "gt_classes" and bitmaps
            "gt_masks"; or both, in one numbering of classes.
        things: classes of which only instances are segments; None for those of no class if there
            are labels alone, of all if there are instances alone.
        ignore_unlabeled: whether pixels without a label, and those of things that are no instance,
            count in no loss of a mask. Without "sem_seg" all pixels are labeled.
    Raises: ValueError if the record has neither.
    """
    labels, objects = record.get("sem_seg"), record.get("instances")
    name = str(record.get("file_name", "without a file name"))
    if labels is None and objects is None:
        raise ValueError(
            f"Image {name} has no labels to train on: neither `sem_seg` nor `instances`."
        )
    classes, masks = [], []
    if objects is not None:
        classes.append(objects.gt_classes.to(device))
        masks.append(_bitmaps(objects.gt_masks, name).to(device))
    ignored = None
    if labels is not None:
        labels = labels.to(device)
        stuff, others = _stuff_classes(labels, things if objects is not None else None)
        classes.append(stuff)
        masks.append(labels[None] == stuff[:, None, None])
        if ignore_unlabeled:
            # Crowds of things are labeled, but are no instance.
            unknown = torch.isin(labels, others)
            covered = masks[0].any(0) if objects is not None else torch.zeros_like(unknown)
            ignored = unknown & ~covered
    return Target(torch.cat(classes), torch.cat(masks), ignored, name)


def _stuff_classes(labels: Tensor, things: Collection[int] | None) -> tuple[Tensor, Tensor]:
    """Split the values of a label map into stuff, and things and ignored pixels."""
    present = labels.unique()
    is_thing = torch.isin(
        present, torch.tensor(sorted(things or ()), dtype=present.dtype, device=labels.device)
    )
    is_stuff = (present != IGNORE) & ~is_thing
    return present[is_stuff], present[~is_stuff]


def _bitmaps(masks: Any, name: str) -> Tensor:
    if isinstance(masks, BitMasks):
        return masks.tensor
    if isinstance(masks, Tensor):
        return masks.bool()
    raise ValueError(
        f"Image {name} has masks as {type(masks).__name__}: Mask2Former learns bitmaps; set "
        'instance_mask_format="bitmask" (INPUT.MASK_FORMAT: "bitmask").'
    )
