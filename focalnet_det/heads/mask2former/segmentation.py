"""From classes and masks of queries to semantic, instance and panoptic segmentation."""

from collections.abc import Collection
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F


def resize_masks(
    masks: Tensor, padded_size: tuple[int, int], size: tuple[int, int], output: tuple[int, int]
) -> Tensor:
    """Resize maps bilinearly to the padded image, crop them, and resize them to the output.

    Args:
        masks: (M, h, w).
        padded_size, size, output: (height, width), pixels, of the padded image, of the image in
            it, and of the result.
    Returns: (M, *output), float32.
    """
    return crop_and_resize(_bilinear(masks.float(), padded_size), size, output)


def crop_and_resize(maps: Tensor, size: tuple[int, int], output: tuple[int, int]) -> Tensor:
    """Crop maps (M, H, W) to an image's size, and resize them bilinearly, (M, *output)."""
    return _bilinear(maps[:, : size[0], : size[1]], output)


def _bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size) or not len(maps):
        return maps.new_zeros(0, *size) if not len(maps) else maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def semantic_scores(class_logits: Tensor, masks: Tensor) -> Tensor:
    """Return the score of each class at each pixel, (K, H, W): sums, not probabilities.

    Args:
        class_logits: (Q, K + 1).
        masks: logits (Q, H, W).
    Source: arXiv:2107.06278, section 3.4 (semantic inference).
    """
    classes = class_logits.float().softmax(-1)[:, :-1]
    return torch.einsum("qk,qhw->khw", classes, masks.sigmoid())


def panoptic_queries(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries that panoptic segmentation uses, their probabilities and classes.

    Args:
        class_logits: (Q, K + 1).
        threshold: smallest probability, exclusive.
    """
    scores, labels = class_logits.float().softmax(-1).max(-1)
    used = (labels != class_logits.shape[-1] - 1) & (scores > threshold)
    return used.nonzero()[:, 0], scores[used], labels[used]


def panoptic_segments(
    scores: Tensor, labels: Tensor, masks: Tensor, things: Collection[int], overlap: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Give each pixel to the query of the largest class probability times mask probability.

    Args:
        scores, labels: of the queries used, (M,).
        masks: their logits, (M, H, W).
        things: classes whose segments stay apart; those of any other class are joined.
        overlap: a segment of which less than this part is left is dropped.
    Returns: int32 (H, W), numbers of segments from 1, 0 for none; and of each segment "id",
        "isthing", "category_id".
    Source: arXiv:2107.06278, section 3.4 (general inference).
    """
    segments = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
    found: list[dict[str, Any]] = []
    if not len(labels):
        return segments, found
    probabilities = masks.sigmoid()
    owner = (scores[:, None, None] * probabilities).argmax(0)
    inside = probabilities >= 0.5
    queries = torch.arange(len(labels), device=masks.device)[:, None, None]
    owned = owner[None] == queries
    # One transfer: areas won, areas of the masks, and what they have in common.
    areas = torch.stack([x.flatten(1).sum(1) for x in (owned, inside, owned & inside)]).tolist()
    numbers: dict[int, int] = {}
    for query, label in enumerate(labels.tolist()):
        won, own, common = (int(area[query]) for area in areas)
        if not (won and own and common) or won / own < overlap:
            continue
        is_thing = label in things
        if is_thing or label not in numbers:
            found.append({"id": len(found) + 1, "isthing": is_thing, "category_id": label})
        number = len(found) if is_thing else numbers.setdefault(label, len(found))
        segments[owned[query] & inside[query]] = number
    return segments, found


def instance_candidates(
    class_logits: Tensor, count: int, things: Collection[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most probable pairs of query and class: queries, classes, probabilities.

    Args:
        class_logits: (Q, K + 1).
        count: of pairs, before those of stuff are left out.
        things: classes that may be instances; None for all.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    scores, pairs = probabilities.flatten().topk(min(count, probabilities.numel()), sorted=False)
    queries, labels = pairs // classes, pairs % classes
    if things is not None:
        kept = torch.isin(labels, torch.tensor(sorted(things), device=labels.device))
        queries, labels, scores = queries[kept], labels[kept], scores[kept]
    return queries, labels, scores


def instances(
    queries: Tensor, labels: Tensor, scores: Tensor, masks: Tensor, output: tuple[int, int]
) -> Instances:
    """Make instances of pairs of query and class.

    Args:
        queries, labels, scores: (R,), see `instance_candidates`.
        masks: logits of the different queries in rising order, (M, *output).
    Returns: "pred_masks" bool, "pred_boxes" tight around them (zero where empty, as all boxes of
            the published code are), "scores" (class probability times the mean
        probability inside the mask), "pred_classes".
    """
    inside = masks > 0
    within = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    mask_of = torch.searchsorted(queries.unique(), queries)
    return Instances(
        output,
        pred_masks=inside[mask_of],
        pred_boxes=Boxes(tight_boxes(inside)[mask_of]),
        scores=scores * within[mask_of],
        pred_classes=labels,
    )


def tight_boxes(masks: Tensor) -> Tensor:
    """Return boxes around masks, bool (M, H, W) -> (M, 4), xyxy, pixels; zeros where empty."""
    boxes = []
    for axis in (1, 2):
        covered = masks.any(axis).int()  # along x, then along y
        first = covered.argmax(-1)
        last = covered.shape[-1] - covered.flip(-1).argmax(-1)
        boxes += [first, last]
    left, right, top, bottom = boxes
    found = torch.stack((left, top, right, bottom), dim=-1).float()
    return found * masks.flatten(1).any(1)[:, None]
