"""One stage of Sparse R-CNN: proposal features interact with the RoI features of their boxes."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..set_prediction.query_attention import MultiheadAttention


class DynamicConv(nn.Module):
    """Filter the RoI feature of each proposal by two layers that its proposal feature generates.

    Args:
        channels: C of proposal and RoI features.
        dynamic_channels: D between the two generated layers.
        resolution: S, side of the RoI features.
    Source: arXiv:2011.12450, section 3.1 (dynamic instance interactive head) and figure 4.
    """

    def __init__(
        self, channels: int = 256, *, dynamic_channels: int = 64, resolution: int = 7
    ) -> None:
        super().__init__()
        self.channels, self.dynamic_channels = channels, dynamic_channels
        self.dynamic_layer = nn.Linear(channels, 2 * channels * dynamic_channels)
        self.norm1 = nn.LayerNorm(dynamic_channels)
        self.norm2 = nn.LayerNorm(channels)
        self.out_layer = nn.Linear(channels * resolution**2, channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, proposals: Tensor, rois: Tensor) -> Tensor:
        """Return one feature per proposal, (R, C).

        Args:
            proposals: (R, C), proposal features.
            rois: (R, C, S, S), RoI features.
        """
        first, second = self.dynamic_layer(proposals).chunk(2, dim=-1)
        cells = rois.flatten(2).transpose(1, 2)  # (R, S * S, C)
        hidden = cells @ first.unflatten(-1, (self.channels, self.dynamic_channels))
        hidden = F.relu(self.norm1(hidden))
        hidden = hidden @ second.unflatten(-1, (self.dynamic_channels, self.channels))
        hidden = F.relu(self.norm2(hidden))
        return F.relu(cast(Tensor, self.norm3(self.out_layer(hidden.flatten(1)))))


class DynamicStage(nn.Module):
    """Self-attention of the proposals, dynamic interaction with RoI features, and predictions.

    Parameter names are those of the authors' code, so that its files load by identity.

    Args:
        num_classes: K.
        channels: C, a multiple of ``heads``.
        feedforward: width of the hidden layer of the feed-forward network.
        class_layers, box_layers: hidden layers before the classes and before the deltas.
        prior: initial probability of a class.
    Source: arXiv:2011.12450, section 3.1; PeizeSun/SparseR-CNN:projects/SparseRCNN/sparsercnn/
        head.py (RCNNHead).
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 256,
        *,
        dynamic_channels: int = 64,
        resolution: int = 7,
        heads: int = 8,
        feedforward: int = 2048,
        class_layers: int = 1,
        box_layers: int = 3,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(channels, heads)
        self.inst_interact = DynamicConv(
            channels, dynamic_channels=dynamic_channels, resolution=resolution
        )
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.cls_module = hidden_layers(channels, class_layers)
        self.reg_module = hidden_layers(channels, box_layers)
        self.class_logits = nn.Linear(channels, num_classes)
        self.bboxes_delta = nn.Linear(channels, 4)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - prior) / prior))

    def forward(self, proposals: Tensor, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refine proposal features, and predict classes and deltas.

        Args:
            proposals: (N, Q, C), proposal features.
            rois: (N * Q, C, S, S), RoI features of their boxes.
        Returns: logits (N, Q, K), deltas (N, Q, 4: dx, dy, dw, dh), and proposal features for the
            next stage (N, Q, C).
        """
        proposals = self.norm1(proposals + self.self_attn(proposals, proposals, proposals))
        interaction = self.inst_interact(proposals.flatten(0, 1), rois).view_as(proposals)
        objects = self.norm2(proposals + interaction)
        objects = self.norm3(objects + self.linear2(F.relu(self.linear1(objects))))
        logits = self.class_logits(self.cls_module(objects))
        deltas = self.bboxes_delta(self.reg_module(objects))
        return logits, deltas, objects


def hidden_layers(channels: int, count: int) -> nn.Sequential:
    """Build linear layers without bias, each with layer norm and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def initial_boxes(count: int, kind: str) -> Tensor:
    """Return the boxes that proposals begin as before training, (count, 4), cxcywh, 0..1.

    Args:
        kind: "image" for the whole image, as published; "grid" for a regular grid of boxes, from
            which short trainings on few images learn sooner.
    Raises: ValueError for another kind.
    Source: arXiv:2011.12450, section 4.3 (initialization of proposal boxes).
    """
    if kind == "image":
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)
    if kind != "grid":
        raise ValueError(f"Unknown initial_boxes {kind!r}. Known: grid, image.")
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    number = torch.arange(count)
    x = (number % columns + 0.5) / columns
    y = (torch.div(number, columns, rounding_mode="floor") + 0.5) / rows
    size = torch.tensor([[1.5 / columns, 1.5 / rows]]).expand(count, 2)
    return torch.cat((torch.stack((x, y), dim=1), size), dim=1)
