"""Select detections in a graph: whole batches, and no loop whose length depends on data.

Detectron2 filters and suppresses boxes image by image, with lists whose lengths depend on the
images. A graph that other programs run needs tensors of fixed rank instead. Here every image has
the same number of candidates and of detections, and those that do not exist are marked.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor
from torchvision.ops import nms, roi_align


class Candidates(NamedTuple):
    """Boxes of which the best are detections.

    Attributes:
        boxes: (N, M, 4), xyxy, pixels of the input.
        scores: (N, M).
        groups: (N, M), int64; boxes suppress only those of their own group.
        valid: (N, M), bool: whether there is such a candidate.
    """

    boxes: Tensor
    scores: Tensor
    groups: Tensor
    valid: Tensor


def concatenate(levels: Sequence[Candidates]) -> Candidates:
    """Concatenate the candidates of several feature maps."""
    return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)))


def grid_anchors(generator: DefaultAnchorGenerator, maps: Sequence[Tensor]) -> list[Tensor]:
    """Compute Detectron2's anchors, with sizes that a graph computes from its input.

    Args:
        generator: that of the model.
        maps: (N, C, H, W) of each level.
    Returns: (H * W * A, 4) of each level, xyxy, pixels.
    """
    anchors = []
    for level, stride, cell in zip(maps, generator.strides, generator.cell_anchors, strict=True):
        height, width = level.shape[-2:]
        rows, columns = (
            (torch.arange(side, device=cell.device, dtype=cell.dtype) + generator.offset) * stride
            for side in (height, width)
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
        anchors.append((shifts + cell).reshape(-1, 4))
    return anchors


def top_candidates(scores: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores and their indices, (N, limit) each; -inf where there are fewer.

    Args:
        scores: (N, M); M may be smaller than ``limit``.
        limit: how many to return.
    """
    # The number of the rest would have to be compared with the limit when the graph is recorded.
    padding = scores.new_full((scores.shape[0], limit), -math.inf)
    values, indices = torch.cat((scores, padding), dim=1).topk(limit, dim=1)
    return values, torch.where(values > -math.inf, indices, 0)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Take rows of each image: (N, M, ...) at (N, R) -> (N, R, ...)."""
    images = torch.arange(values.shape[0], device=values.device)
    return values[images[:, None], indices]


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Clip boxes (..., 4), xyxy, to an image of (height, width) pixels."""
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    x1, x2 = (x.clamp(min=0, max=width) for x in (x1, x2))
    y1, y2 = (y.clamp(min=0, max=height) for y in (y1, y2))
    return torch.stack((x1, y1, x2, y2), dim=-1)


def is_nonempty(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    """Tell which boxes (..., 4) are wider and higher than a threshold, pixels."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides > threshold).all(dim=-1)


def best_per_image(
    candidates: Candidates, *, group_count: int, iou_threshold: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Suppress overlapping candidates, and return the best of each image, best first.

    Args:
        candidates: of all images.
        group_count: number of groups.
        iou_threshold: IoU above which the candidate with the lower score is suppressed.
        limit: number of candidates that are returned for an image.
    Returns: indices (N, limit) into the candidates of the image, and whether there is one.
    """
    boxes, scores, groups, valid = candidates
    count, size = scores.shape
    spread = _spread_groups(boxes, groups, group_count).flatten(0, 1)
    given = valid.flatten().nonzero()[:, 0]
    # Two boxes apart from all others, of lowest score, that are kept in any case and then dropped:
    # recorded graphs expect that at least two boxes are kept, and some runtimes that any are given.
    corner = spread.min() - 8
    apart = corner + spread.new_tensor([[0.0, 0, 1, 1], [3, 3, 4, 4]])
    lowest = scores.new_full((2,), torch.finfo(scores.dtype).min)
    indices = torch.cat((given, count * size + torch.arange(2, device=given.device)))
    kept = nms(
        torch.cat((spread[given], apart)),
        torch.cat((scores.flatten()[given], lowest)),
        iou_threshold,
    )
    kept = indices[kept]
    images = kept // size
    # Of the candidates that are kept, sorted by score, how many of the image come before. The two
    # boxes belong to no image.
    same = (images[:, None] == torch.arange(count, device=boxes.device)).long()
    rank = (same.cumsum(dim=0) * same).sum(dim=1) - 1
    # What is beyond the limit goes to a row that is cut off.
    belongs = (rank >= 0) & (rank < limit)
    slots = torch.where(belongs, images * limit + rank, count * limit)
    chosen = torch.full((count * limit + 1,), -1, dtype=torch.int64, device=boxes.device)
    chosen = chosen.index_put((slots,), kept % size)[:-1].view(count, limit)
    return chosen.clamp(min=0), chosen >= 0


def _spread_groups(boxes: Tensor, groups: Tensor, group_count: int) -> Tensor:
    """Move the groups of all images apart, so that boxes of different groups do not overlap.

    They are laid out in two dimensions: in a row, the numbers would be so large that float32
    rounds the sides of small boxes.
    """
    count = boxes.shape[0]
    columns = math.ceil(math.sqrt(group_count))
    rows = math.ceil(group_count / columns)
    images = torch.arange(count, device=boxes.device)[:, None]
    x, y = groups % columns, images * rows + groups // columns
    cell = boxes.max() - boxes.min().clamp(max=0) + 1
    shifts = torch.stack((x, y, x, y), dim=-1).to(boxes.dtype) * cell
    return boxes + shifts


def pool_levels(pooler: ROIPooler, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Pool the features of boxes, each from the level of its size, as Detectron2 does.

    Args:
        pooler: with RoIAlign, that of the model.
        maps: (N, C, H, W) of each level.
        boxes: (N, R, 4), xyxy, pixels.
    Returns: (N * R, C, S, S).
    """
    count, size = boxes.shape[:2]
    flat = boxes.reshape(-1, 4)
    images = torch.arange(count, device=boxes.device, dtype=boxes.dtype)
    indices = images[:, None].expand(count, size).reshape(-1, 1)
    area = (flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1])
    # Source: detectron2:modeling/poolers.py (assign_boxes_to_levels).
    ratio = area.sqrt() / pooler.canonical_box_size + 1e-8
    levels = torch.floor(pooler.canonical_level + torch.log2(ratio))
    levels = levels.clamp(min=pooler.min_level, max=pooler.max_level)[:, None]
    pooled = None
    for number, (level, layer) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        here = levels == pooler.min_level + number
        # A box of another level costs one sample per cell. A list of the boxes of this level
        # could be empty, which not every runtime accepts.
        rois = torch.cat((indices, torch.where(here, flat, flat.new_tensor([0.0, 0, 1, 1]))), 1)
        part = roi_align(
            level,
            rois,
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        pooled = part if pooled is None else torch.where(here[..., None, None], part, pooled)
    assert pooled is not None
    return pooled
