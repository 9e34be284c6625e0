"""Match boxes with objects by the statistics of the overlaps of the nearest boxes."""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ...layers.checks import check_integer

# The center of a positive box lies inside its object by more than this, pixels.
MIN_CENTER_MARGIN = 0.01


class ATSSMatcher:
    """Adaptive training sample selection.

    The candidates of an object are the boxes of each level whose centers are nearest to its center.
    Those whose IoU with it reaches the mean plus the standard deviation over its candidates, and
    whose center lies inside it, are positive. A box that is positive for several objects belongs to
    the one that it overlaps most.

    Args:
        topk: number of candidates of a level; all boxes of a level that has fewer.
    Raises: ValueError if ``topk`` is not positive.
    Source: arXiv:1912.02424, algorithm 1; open-mmlab/mmdetection:mmdet/core/bbox/assigners/
    atss_assigner.py.
    """

    def __init__(self, topk: int = 9) -> None:
        check_integer("topk", topk, 1, 100_000)
        self.topk = topk

    @torch.no_grad()
    def __call__(self, boxes: Sequence[Tensor], objects: Tensor) -> Tensor:
        """Match boxes with the objects of an image.

        Args:
            boxes: (A_l, 4) of each level, xyxy, absolute pixels.
            objects: (G, 4), xyxy, absolute pixels.
        Returns: (A,), index of the object of each box of all levels, -1 for background.
        """
        all_boxes = torch.cat(list(boxes))
        if not len(objects):
            return torch.full_like(all_boxes[:, 0], -1, dtype=torch.long)
        candidates = self._find_candidates(boxes, objects)
        overlaps = pairwise_iou(Boxes(objects), Boxes(all_boxes)).gather(1, candidates)
        # The deviation of a single candidate is not defined.
        deviations = overlaps.std(dim=1) if overlaps.shape[1] > 1 else 0.0
        thresholds = overlaps.mean(dim=1) + deviations
        margins = _center_margins(_centers(all_boxes)[candidates], objects[:, None])
        positive = (overlaps >= thresholds[:, None]) & (margins > MIN_CENTER_MARGIN)
        best = overlaps.new_full((len(objects), len(all_boxes)), -1.0)
        best.scatter_(1, candidates, torch.where(positive, overlaps, -1.0))
        overlap, index = best.max(dim=0)
        return torch.where(overlap >= 0, index, -1)

    def _find_candidates(self, boxes: Sequence[Tensor], objects: Tensor) -> Tensor:
        """Return the indices (G, C) of the candidates of each object among all boxes."""
        found, first = [], 0
        for level in boxes:
            distances = (_centers(level)[:, None] - _centers(objects)).pow(2).sum(dim=-1).sqrt()
            nearest = distances.topk(min(self.topk, len(level)), dim=0, largest=False).indices
            found.append(first + nearest.T)
            first += len(level)
        return torch.cat(found, dim=1)


def _centers(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _center_margins(centers: Tensor, objects: Tensor) -> Tensor:
    """Return the least distance of centers (..., 2) from the sides of objects (..., 4), pixels."""
    sides = torch.cat([centers - objects[..., :2], objects[..., 2:] - centers], dim=-1)
    return sides.amin(dim=-1)


def matched_targets(matches: Tensor, truth: Instances, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the class and the box of the object of each box.

    Args:
        matches: (A,), index of the object, -1 for background.
        truth: ``gt_boxes`` and ``gt_classes`` of the image.
        num_classes: class of the background.
    Returns: classes (A,), and boxes (A, 4), xyxy, absolute pixels, zeros for the background.
    """
    positive = matches >= 0
    classes = torch.full_like(matches, num_classes)
    classes[positive] = truth.gt_classes[matches[positive]]
    boxes = truth.gt_boxes.tensor.new_zeros(len(matches), 4)
    boxes[positive] = truth.gt_boxes.tensor[matches[positive]]
    return classes, boxes
