"""Define the head of RepPoints v2."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from ...layers.conv_gn import conv_gn
from .corner_pool import CornerPool

POINTS = 9
# Share of the gradient that sampling at the initial points passes back to them.
GRADIENT_SHARE = 0.1
# Scores and offsets of two corners, which are appended to the features.
CORNER_MAPS = 6


class Predictions(NamedTuple):
    """Predictions on each level, lists of maps (N, C, H, W).

    Attributes:
        logits: C = K, class logits.
        initial, refined: C = 18, points as y0, x0, y1, x1, ..., in cells from their own cell.
        corner_scores: C = 2, logits of top-left and bottom-right corners.
        corner_offsets: C = 4, x and y of each corner in its cell, in cells.
        semantic: C = K, logits of the classes of the boxes that cover a cell.
    """

    logits: list[Tensor]
    initial: list[Tensor]
    refined: list[Tensor]
    corner_scores: list[Tensor]
    corner_offsets: list[Tensor]
    semantic: list[Tensor]


class RepPointsV2Head(nn.Module):
    """Point sets, refined where they sample the features, with a corner and a semantic branch.

    The names of the parameters are the published ones.

    Args:
        num_classes: K.
        channels: of the levels and of all features, divisible by 32.
        convs: number of convolutions of the class branch and of the point branch.
        shared_convs: further convolutions of the corner branch and the semantic branch.
        corner_channels: of the maps that are pooled, divisible by 32.
        prior_prob: initial score of every class and corner.
    Source: arXiv:2007.08508, section 4; Scalsol/RepPointsV2:mmdet/models/dense_heads/
    reppoints_v2_head.py, as configured in SwinTransformer/Swin-Transformer-Object-Detection:
    configs/_base_/models/reppointsv2_swin_bifpn.py.
    """

    sampling_grid: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 256,
        convs: int = 3,
        shared_convs: int = 1,
        corner_channels: int = 64,
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__()
        self.cls_convs, self.reg_convs, self.shared_convs = (
            nn.ModuleList(conv_gn(channels, channels) for _ in range(number))
            for number in (convs, convs, shared_convs)
        )
        self.reppoints_sem_out = nn.Conv2d(channels, num_classes, 1)
        self.reppoints_sem_embedding = conv_gn(channels, channels, 1)
        self.hem_tl = CornerPool(channels, corner_channels, top_left=True)
        self.hem_br = CornerPool(channels, corner_channels, top_left=False)
        self.reppoints_hem_tl_score_out = nn.Conv2d(channels, 1, 3, padding=1)
        self.reppoints_hem_br_score_out = nn.Conv2d(channels, 1, 3, padding=1)
        self.reppoints_hem_tl_offset_out = nn.Conv2d(channels, 2, 3, padding=1)
        self.reppoints_hem_br_offset_out = nn.Conv2d(channels, 2, 3, padding=1)
        self.reppoints_pts_init_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.reppoints_pts_init_out = nn.Conv2d(channels, 2 * POINTS, 1)
        wider = channels + CORNER_MAPS
        self.reppoints_cls_conv = DeformConv2d(wider, channels, 3, padding=1, bias=False)
        self.reppoints_cls_out = nn.Conv2d(channels, num_classes, 1)
        self.reppoints_pts_refine_conv = DeformConv2d(wider, channels, 3, padding=1, bias=False)
        self.reppoints_pts_refine_out = nn.Conv2d(channels, 2 * POINTS, 1)
        steps = torch.arange(-1.0, 2.0)
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
        self.register_buffer("sampling_grid", grid.reshape(1, 2 * POINTS, 1, 1), persistent=False)
        self._initialize(prior_prob)

    def _initialize(self, prior_prob: float) -> None:
        prior = -math.log((1 - prior_prob) / prior_prob)
        for name, parameter in self.named_parameters():
            # Norms, the corner pools and the embedding keep their initial values.
            if re.search(r"(convs\.\d+\.|_)(conv|out)\.weight$", name):
                nn.init.normal_(parameter, std=0.01)
            elif name.endswith(("_conv.bias", "_out.bias")):
                scored = name.endswith(("cls_out.bias", "sem_out.bias", "score_out.bias"))
                nn.init.constant_(parameter, prior if scored else 0.0)

    def forward(self, features: Sequence[Tensor]) -> Predictions:
        """Predict for all levels, (N, C, H, W) each, with shared weights."""
        levels = [self._predict_level(feature) for feature in features]
        return Predictions(*(list(maps) for maps in zip(*levels, strict=True)))

    def _predict_level(self, feature: Tensor) -> tuple[Tensor, ...]:
        """Predict for a level, in the order of `Predictions`."""
        classes = points = feature
        for conv in self.cls_convs:
            classes = conv(classes)
        for conv in self.reg_convs:
            points = conv(points)
        shared = points
        for conv in self.shared_convs:
            shared = conv(shared)
        semantic = self.reppoints_sem_out(shared)
        embedding = self.reppoints_sem_embedding(shared)
        classes, points, corners = classes + embedding, points + embedding, shared + embedding
        scores, offsets = self._predict_corners(corners)
        initial = self.reppoints_pts_init_out(self.reppoints_pts_init_conv(points).relu())
        sampled = (1 - GRADIENT_SHARE) * initial.detach() + GRADIENT_SHARE * initial
        sampled = sampled - self.sampling_grid
        corner_maps = [scores, offsets]
        classes = _sample(self.reppoints_cls_conv, [classes, *corner_maps], sampled)
        points = _sample(self.reppoints_pts_refine_conv, [points, *corner_maps], sampled)
        logits = self.reppoints_cls_out(classes.relu())
        refined = self.reppoints_pts_refine_out(points.relu()) + initial.detach()
        return logits, initial, refined, scores, offsets, semantic

    def _predict_corners(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return score logits (N, 2, H, W) and offsets (N, 4, H, W), top-left before the other."""
        top_left, bottom_right = self.hem_tl(features), self.hem_br(features)
        scores = [
            self.reppoints_hem_tl_score_out(top_left),
            self.reppoints_hem_br_score_out(bottom_right),
        ]
        offsets = [
            self.reppoints_hem_tl_offset_out(top_left),
            self.reppoints_hem_br_offset_out(bottom_right),
        ]
        return torch.cat(scores, dim=1), torch.cat(offsets, dim=1)


def _sample(conv: DeformConv2d, maps: Sequence[Tensor], points: Tensor) -> Tensor:
    """Apply a deformable convolution to joined maps (N, C_i, H, W), in float32.

    torchvision has no other precision on the CPU, and falls back to this one under autocast
    elsewhere.

    Args:
        points: (N, 18, H, W), y and x of each position less that of the kernel, in cells.
    """
    features = torch.cat(list(maps), dim=1)
    with torch.autocast(features.device.type, enabled=False):
        sampled = deform_conv2d(
            features.float(), points.float(), conv.weight.float(), padding=conv.padding
        )
    return sampled.to(features.dtype)
