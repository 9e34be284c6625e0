"""DINO's neck: all levels with one number of channels, and levels that the backbone lacks."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..set_prediction.levels import input_projection


class LevelNeck(nn.ModuleList):
    """Project the features of a backbone, high resolution first, and go on by strided convolutions.

    The group norms read batch padding, so that an image's features depend on it a little, as in
    the published models, even with ``valid_context``.

    Args:
        input_shape: of one feature or more, with channels and strides.
        channels: C, a multiple of 32, at least 64: a group norm needs two values.
        levels: L, at least as many as there are features.
    Raises: ValueError if there are fewer levels than features.
    Source: arXiv:2203.03605, section 4.1; FocalNet/FocalNet-DINO:models/dino/dino.py.
    """

    def __init__(self, input_shape: Mapping[str, Any], *, channels: int, levels: int) -> None:
        names = sorted(input_shape, key=lambda name: int(input_shape[name].stride))
        if not names or levels < len(names):
            raise ValueError(
                f"DINO with {levels} scales reads one to {levels} features, got {len(names)}: "
                f"{', '.join(names)}. Change scales or in_features."
            )
        widths = [input_shape[name].channels for name in names]
        # The first further level reads the backbone's last map, not its projection.
        further = [widths[-1], *[channels] * (levels - len(names))]
        super().__init__(
            [
                *(input_projection(width, channels) for width in widths),
                *(input_projection(a, b, kernel_size=3, stride=2) for a, b in pairwise(further)),
            ]
        )
        self.in_features = tuple(names)

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the maps of all levels, (N, C, h, w) each."""
        maps: list[Tensor] = []
        source: Sequence[Tensor] = [features[name] for name in self.in_features]
        for i, projection in enumerate(self):
            if i < len(source):
                maps.append(projection(source[i]))
            else:
                maps.append(projection(source[-1] if i == len(source) else maps[-1]))
        return maps
