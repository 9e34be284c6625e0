"""Put the classification head of the official code on a backbone."""

from typing import Any

from torch import Tensor, nn

from ..layers import channels_last, layer_norm
from .build import build_backbone
from .stages import StagedBackbone

# First parts of the names that are not the backbone's, in state dicts.
HEAD_NAMES = ("norm", "head", "mask_token", "decoder")
BACKBONE_PREFIX = "backbone."


class HeadedNetwork(nn.Module):
    """A backbone, the final norm of the official classifiers, and the head that a subclass adds.

    State dicts have the names of the official classification code: those of ``backbone`` without a
    prefix, beside ``norm`` and the head. So a file saved here is an official one, and the other way
    around.

    Args:
        backbone: without output norms; its last feature is read.
    Raises: ValueError if the backbone has output norms.

    Attributes:
        feature: name of the feature that is read.
        stride: of that feature, pixels.
    """

    def __init__(self, backbone: StagedBackbone) -> None:
        super().__init__()
        if backbone.output_norm:
            raise ValueError(
                "The official head has a norm of its own: build its backbone with "
                "output_norm=False."
            )
        self.backbone = backbone
        self.feature = backbone.stage_names[-1]
        shape = backbone.shapes[self.feature]
        self.channels, self.stride = shape.channels, shape.stride
        self.norm = nn.LayerNorm(self.channels)
        self._register_state_dict_hook(_to_official_names)
        self._register_load_state_dict_pre_hook(_from_official_names)

    def normalized(self, features: dict[str, Tensor]) -> Tensor:
        """Return the last feature after the final norm, (N, H, W, C)."""
        return layer_norm(channels_last(features[self.feature]), self.norm)


def _to_official_names(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # Every entry is inserted anew, which keeps their order.
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)
        state[prefix + name.removeprefix(prefix).removeprefix(BACKBONE_PREFIX)] = value


def _from_official_names(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        inside = name.removeprefix(prefix)
        if inside.split(".")[0] not in HEAD_NAMES:
            state[prefix + BACKBONE_PREFIX + inside] = state.pop(name)


class Classifier(HeadedNetwork):
    """Image classifier: final norm, mean over the last feature map, linear layer.

    Args:
        backbone: see :class:`HeadedNetwork`.
        num_classes: number of logits.
    Source: microsoft/FocalNet:classification/focalnet.py (FocalNet.forward_features);
    microsoft/Focal-Transformer:classification/focal_transformer.py has the same head.
    """

    def __init__(self, backbone: StagedBackbone, num_classes: int = 1000) -> None:
        super().__init__(backbone)
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}.")
        self.num_classes = num_classes
        self.head = nn.Linear(self.channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images, (N, in_channels, H, W), to logits, (N, num_classes)."""
        return self.logits(self.backbone(x))

    def logits(self, features: dict[str, Tensor]) -> Tensor:
        """Map the features of the backbone to logits, (N, num_classes)."""
        pooled = self.normalized(features).mean(dim=(1, 2))
        logits: Tensor = self.head(pooled)
        return logits


def build_classifier(name: str, num_classes: int = 1000, **overrides: Any) -> Classifier:
    """Build a classifier with random weights; :func:`focalnet_det.create_classifier` loads some.

    Args:
        name: variant, see :func:`focalnet_det.list_backbones`.
        num_classes: number of logits.
        overrides: constructor arguments of the backbone that replace those of the variant.
    Raises: as :func:`build_backbone`; ValueError for an override of the features.
    """
    for fixed in ("out_features", "output_norm"):
        if fixed in overrides:
            raise ValueError(f"A classifier fixes {fixed}: it reads the last feature before norms.")
    return Classifier(build_backbone(name, output_norm=False, **overrides), num_classes)
