"""Contrastive denoising: queries made of noised objects, which a layer learns to restore.

Drawing noise and building queries are separate, so that queries can be built from given noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..set_prediction.assignment import Match
from ..set_prediction.box_matching import BoxTarget
from ..set_prediction.box_numbers import inverse_sigmoid, to_cxcywh


class Layout(NamedTuple):
    """Places of denoising queries: groups of positives, then negatives, of the largest image.

    Attributes:
        groups: G.
        most: M, objects of the image that has most.
    """

    groups: int
    most: int

    @property
    def width(self) -> int:
        """Number of queries of an image, 2 * G * M."""
        return 2 * self.groups * self.most


class Noise(NamedTuple):
    """Noised copies of all objects of a batch: two of each for each group, positives first.

    Attributes:
        labels: int64 (2 * G, T), T the objects of all images, one image after the other.
        shifts: (2 * G, T, 4), of the corners x0, y0, x1, y1, in halves of the box's sides, before
            the scale: -1..1 for positives, beyond for negatives.
    """

    labels: Tensor
    shifts: Tensor


class DenoisingQueries(NamedTuple):
    """Denoising queries of a batch.

    Attributes:
        labels: int64 (N, W), noised classes; -1 in places that no object has.
        boxes: (N, W, 4), logits of noised boxes, cxcywh; 0 in places that no object has.
        layout: of the places.
    """

    labels: Tensor
    boxes: Tensor
    layout: Layout


def plan_groups(targets: Sequence[BoxTarget], queries: int) -> Layout:
    """Return as many groups as give about ``2 * queries`` denoising queries, at least one."""
    most = max((len(target.labels) for target in targets), default=0)
    return Layout(max(1, 2 * queries // max(2 * most, 1)) if most else 1, most)


def draw_noise(
    targets: Sequence[BoxTarget], groups: int, *, num_classes: int, label_noise: float
) -> Noise:
    """Draw noise for the objects of a batch.

    Args:
        groups: G.
        num_classes: K, of which replaced labels are drawn; the true one may be among them.
        label_noise: probability with which a label is replaced.
    Source: arXiv:2203.03605, section 3.3; FocalNet/FocalNet-DINO:models/dino/dn_components.py.
    """
    labels = torch.cat([target.labels for target in targets]).repeat(2 * groups, 1)
    replaced = torch.rand(labels.shape, device=labels.device) < label_noise
    labels = torch.where(replaced, torch.randint_like(labels, num_classes), labels)
    shape = (groups, 2, labels.shape[1], 4)
    sizes = torch.rand(shape, device=labels.device)
    sizes[:, 1] += 1
    signs = torch.randint(0, 2, shape, device=labels.device) * 2 - 1
    return Noise(labels, (sizes * signs).flatten(0, 1))


def noised_boxes(boxes: Tensor, shifts: Tensor, scale: float) -> Tensor:
    """Move the corners of boxes, (T, 4) xyxy, 0..1 -> (2 * G, T, 4) cxcywh, inside the image.

    Args:
        shifts: (2 * G, T, 4), see `Noise`.
        scale: factor of the shifts.
    """
    halves = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) / 2
    return to_cxcywh((boxes + shifts * halves * scale).clamp(0, 1))


def build_queries(
    targets: Sequence[BoxTarget], noise: Noise, layout: Layout, box_noise: float
) -> DenoisingQueries:
    """Put noised objects into their places.

    Args:
        targets: objects of the images.
        noise: of all of them.
        box_noise: scale of the shifts of corners.
    """
    device = noise.labels.device
    logits = inverse_sigmoid(
        noised_boxes(torch.cat([target.boxes for target in targets]), noise.shifts, box_noise)
    )
    shape = (len(targets), 2 * layout.groups, layout.most)
    labels = torch.full(shape, -1, dtype=torch.int64, device=device)
    boxes = torch.zeros(*shape, 4, device=device)
    start = 0
    for i, target in enumerate(targets):
        own = slice(start, start + len(target.labels))
        start = own.stop
        labels[i, :, : len(target.labels)] = noise.labels[:, own]
        boxes[i, :, : len(target.labels)] = logits[:, own]
    return DenoisingQueries(labels.flatten(1), boxes.flatten(1, 2), layout)


def blocked_attention(layout: Layout, queries: int, device: torch.device) -> Tensor:
    """Return which queries must not read which, bool (W + Q, W + Q), denoising queries first.

    No group reads another one, and matching queries read no denoising ones.

    Args:
        queries: Q, of the matching part.
    """
    group = torch.arange(layout.width + queries, device=device)
    group = group.div(max(2 * layout.most, 1), rounding_mode="floor")
    group[layout.width :] = layout.groups
    matching = group == layout.groups
    return (group[:, None] != group) & ~matching


def denoising_matches(
    targets: Sequence[BoxTarget], layout: Layout, device: torch.device
) -> list[Match]:
    """Return the positive queries of each image and their objects."""
    matches = []
    for target in targets:
        objects = torch.arange(len(target.labels), device=device)
        starts = torch.arange(layout.groups, device=device) * (2 * layout.most)
        queries = (starts[:, None] + objects).flatten()
        matches.append((queries, objects.repeat(layout.groups)))
    return matches
