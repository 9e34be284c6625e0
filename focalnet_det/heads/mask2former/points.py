"""Values of masks at points: losses are computed there, never on whole masks."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Sample maps bilinearly at points, zero outside.

    Args:
        logits: (M, h, w), at any stride, over the whole padded image.
        points: (M, P, 2: x, y), or (1, P, 2) for the same ones in all maps; 0..1.
    Returns: (M, P).
    """
    grid = (2 * points - 1)[:, :, None]
    if len(points) == 1:
        return F.grid_sample(logits[None], grid, align_corners=False)[0, :, :, 0]
    return F.grid_sample(logits[:, None], grid, align_corners=False)[:, 0, :, 0]


def sample_masks(masks: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Sample masks bilinearly at points, zero outside, with no copy of a mask in float.

    Args:
        masks: bool (M, H, W), of the image without padding.
        points: (M or 1, P, 2: x, y), 0..1 in the padded image.
        padded_size: (height, width) of the padded image, pixels.
    Returns: (M, P), float32, 0..1.
    """
    height, width = masks.shape[-2:]
    if masks.numel() == 0 or points.numel() == 0:
        return points.new_zeros(len(masks), points.shape[1])
    points = points.expand(len(masks), -1, -1)
    x, y = points[..., 0] * padded_size[1] - 0.5, points[..., 1] * padded_size[0] - 0.5
    left, top = x.floor(), y.floor()
    flat, total = masks.flatten(1), torch.zeros_like(x)
    for row, by_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, by_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cell = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            total += flat.gather(1, cell) * inside * (by_y * by_x)
    return total


@torch.no_grad()
def choose_points(
    logits: Tensor, count: int, *, oversampling: float = 3.0, uncertain: float = 0.75
) -> Tensor:
    """Choose points for the loss of each mask: mostly those where it is least certain.

    Args:
        logits: (M, h, w).
        count: points of a mask.
        oversampling: uniform candidates for each point.
        uncertain: part of the points that are the candidates of smallest |logit|; the others are
            fresh and uniform.
    Returns: (M, count, 2: x, y), 0..1.
    Source: arXiv:1912.08193, section 3.1 (training); arXiv:2112.01527, section 3.3.
    """
    candidates = torch.rand(len(logits), int(count * oversampling), 2, device=logits.device)
    chosen = int(uncertain * count)
    certainty = sample_logits(logits, candidates).abs()
    nearest = certainty.topk(chosen, dim=1, largest=False).indices
    least_certain = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    fresh = torch.rand(len(logits), count - chosen, 2, device=logits.device)
    return torch.cat((least_certain, fresh), dim=1)
