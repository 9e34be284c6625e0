"""Turn the predictions of RepPoints v2 into boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reppoints_head import Predictions
from .reppoints_targets import grid_points


def decode_boxes(points: Tensor, stride: int) -> Tensor:
    """Return the boxes that the first two points of each cell span.

    Args:
        points: (N, 18, H, W), y0, x0, y1, x1, ..., in cells from their own cell.
        stride: of the map, pixels.
    Returns: (N, H * W, 4), xyxy, absolute pixels, float32; sides may be swapped.
    """
    corners = points[:, [1, 0, 3, 2]].float().flatten(2).transpose(1, 2)
    cells = grid_points(points.shape[-2:], stride, points.device)
    return corners * stride + cells.repeat(1, 2)


def crop_to_image(
    predictions: Predictions, image: int, size: tuple[int, int], strides: Sequence[int]
) -> Predictions:
    """Crop the predictions of a batch to one image.

    Args:
        image: index in the batch.
        size: (height, width) of the image with the padding that it would have alone, pixels.
        strides: of the levels.
    Returns: maps (1, C, ceil(height / stride), ceil(width / stride)).
    """
    kinds = [
        [
            level[image : image + 1, :, : -(-size[0] // stride), : -(-size[1] // stride)]
            for level, stride in zip(maps, strides, strict=True)
        ]
        for maps in predictions
    ]
    return Predictions(*kinds)


def snap_to_corners(points: Tensor, scores: Tensor, offsets: Tensor, stride: int) -> Tensor:
    """Move points to the likeliest corners among the four cells around them.

    The four cells are the one below and left of which the point lies, and those after it in both
    directions.

    Args:
        points: (R, 2), x and y, pixels.
        scores: (H, W), corner logits; at least two cells in both directions.
        offsets: (2, H, W), x and y of the corner in its cell, in cells.
        stride: of the maps, pixels.
    Returns: (R, 2), pixels.
    Source: Scalsol/RepPointsV2:mmdet/models/dense_heads/reppoints_v2_head.py.
    """
    rows, columns = scores.shape
    last = points.new_tensor([columns - 2, rows - 2])
    first = (points / stride).clamp(min=0).minimum(last).long()
    steps = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=points.device)
    cells = first[:, None] + steps
    x, y = cells.unbind(-1)
    best = scores[y, x].argmax(dim=1, keepdim=True)
    x, y = x.gather(1, best)[:, 0], y.gather(1, best)[:, 0]
    return (torch.stack([x, y], dim=1) + offsets[:, y, x].T) * stride


def snap_boxes(boxes: Tensor, predictions: Predictions, level: int, stride: int) -> Tensor:
    """Snap both corners of boxes (R, 4), xyxy, pixels, to those of a level; see above.

    Args:
        predictions: of one image.
        level: index of the level whose corners are used.
        stride: of that level.
    """
    scores = predictions.corner_scores[level][0].float()
    offsets = predictions.corner_offsets[level][0].float()
    return torch.cat(
        [
            snap_to_corners(boxes[:, :2], scores[0], offsets[:2], stride),
            snap_to_corners(boxes[:, 2:], scores[1], offsets[2:], stride),
        ],
        dim=1,
    )
