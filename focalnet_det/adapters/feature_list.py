"""Return features as timm's ``features_only`` models do: a list, described by ``feature_info``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..backbones import FeatureShape, StagedBackbone


@dataclass(frozen=True)
class FeatureInfo:
    """Names, channels and strides of the features, read as timm's class of this name is.

    Attributes:
        shapes: by name of the feature, fine to coarse.
    """

    shapes: Mapping[str, FeatureShape]

    def channels(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """Return the channels of all features, or of those with these indices."""
        return _select([shape.channels for shape in self.shapes.values()], idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """Return the strides, pixels, of all features, or of those with these indices."""
        return _select([shape.stride for shape in self.shapes.values()], idx)

    def module_name(self, idx: int) -> str:
        """Return the name of a feature."""
        return list(self.shapes)[idx]

    def __len__(self) -> int:
        return len(self.shapes)


def _select(values: list[int], idx: int | Sequence[int] | None) -> int | list[int]:
    if idx is None:
        return values
    return values[idx] if isinstance(idx, int) else [values[i] for i in idx]


class FeatureListBackbone(nn.Module):
    """A backbone for code that is written for timm's ``features_only`` models.

    Attributes:
        feature_info: describes the list that `forward` returns.
    """

    def __init__(self, body: StagedBackbone) -> None:
        super().__init__()
        self.body = body
        self.feature_info = FeatureInfo(body.output_shape())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (N, C, H, W) to the features, fine to coarse, (N, C', ceil(H / stride), ...)."""
        return list(self.body(images).values())
