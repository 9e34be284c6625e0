"""Build the backbones of other libraries for speed comparisons; all of them are optional."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import FocalNet
from ..create import create_backbone

Features = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Contender:
    """A network in one setting of the comparison.

    Attributes:
        name: label in tables.
        module: owner of the parameters.
        features: function from an image batch, (N, 3, H, W), to feature maps.
        channels_last: run on images in channels-last memory format.
        path: value of ``FOCALNET_DET_OPS`` while it runs (ours only).
        equal: whether it has our weights, so that its last feature map must be equal to ours.
    """

    name: str
    module: nn.Module
    features: Features
    channels_last: bool = False
    path: str | None = None
    equal: bool = False


def focalnet(levels: int, window: int) -> FocalNet:
    """Build FocalNet-T without output norms and drop path; kernels are ``window``, + 2, + 4, ..."""
    net = create_backbone(
        "focalnet_tiny_srf",
        focal_levels=(levels,) * 4,
        focal_windows=(window,) * 4,
        output_norm=False,
        drop_path_rate=0.0,
    )
    assert isinstance(net, FocalNet)
    return net


def timm_focalnet(net: FocalNet, levels: int, window: int) -> tuple[nn.Module, Features]:
    """Build timm's FocalNet-T with the weights of ``net``.

    Raises: ImportError without timm.
    """
    from timm.models.focalnet import FocalNet as Peer

    peer: Any = Peer(num_classes=0, focal_levels=(levels,) * 4, focal_windows=(window,) * 4)
    _copy(net, peer, _timm_name)

    def features(x: Tensor) -> list[Tensor]:
        maps: Any = peer.forward_intermediates(x, intermediates_only=True)
        return list(maps)

    return peer, features


def transformers_focalnet(net: FocalNet, levels: int, window: int) -> tuple[nn.Module, Features]:
    """Build Hugging Face's FocalNet-T with the weights of ``net``; it returns the last map only.

    Raises: ImportError without transformers.
    """
    from transformers import FocalNetConfig, FocalNetModel

    config = FocalNetConfig(
        focal_levels=[levels] * 4, focal_windows=[window] * 4, drop_path_rate=0.0
    )
    peer: Any = FocalNetModel(config, add_pooling_layer=False)
    peer.layernorm = nn.Identity()
    _copy(net, peer, _transformers_name)

    def features(x: Tensor) -> list[Tensor]:
        tokens = peer(x).last_hidden_state
        height, width = (-(-side // 32) for side in x.shape[2:])
        return [tokens.mT.unflatten(2, (height, width))]

    return peer, features


def timm_backbone(name: str, size: tuple[int, int]) -> tuple[nn.Module, Features]:
    """Build a backbone of timm with random weights.

    Raises: ImportError without timm.
    """
    import timm

    options: dict[str, Any] = {"img_size": size} if name.startswith("swin") else {}
    peer = timm.create_model(name, features_only=True, pretrained=False, **options)
    return peer, peer


def torchvision_swin() -> tuple[nn.Module, Features]:
    """Build torchvision's Swin-T with random weights; its four feature maps are (N, H, W, C)."""
    from torchvision.models import swin_t

    layers: Any = swin_t(weights=None).features

    def features(x: Tensor) -> list[Tensor]:
        maps = []
        for number, layer in enumerate(layers):
            x = layer(x)
            if number % 2:  # blocks; even layers are patch embedding and merging
                maps.append(x)
        return maps

    return layers, features


def _timm_name(name: str) -> str:
    name = name.replace("patch_embed.", "stem.")
    # timm downsamples at the start of a stage, the official code and this package at the end.
    return re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)


def _transformers_name(name: str) -> str:
    for pattern, replacement in (
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^patch_embed\.norm", "embeddings.norm"),
        (r"^layers\.(\d)\.blocks", r"encoder.stages.\1.layers"),
        (r"^layers\.(\d)\.downsample\.proj", r"encoder.stages.\1.downsample.projection"),
        (r"^layers\.", "encoder.stages."),
        (r"modulation\.f\.", "modulation.projection_in."),
        (r"modulation\.h\.", "modulation.projection_context."),
        (r"modulation\.proj\.", "modulation.projection_out."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def _copy(net: FocalNet, peer: nn.Module, rename: Callable[[str], str]) -> None:
    """Copy the weights of ``net`` to a peer.

    Raises: KeyError if their parameters differ.
    """
    skipped = ("head.", "norm.", "layernorm.", "embeddings.mask_token")
    target = {k: v for k, v in peer.state_dict().items() if not k.startswith(skipped)}
    source = {rename(name): value for name, value in net.state_dict().items()}
    if source.keys() != target.keys():
        raise KeyError(
            f"Parameters of the peer differ from ours: {sorted(source.keys() ^ target.keys())}."
        )
    for name, value in source.items():
        target[name].copy_(value.reshape(target[name].shape))
