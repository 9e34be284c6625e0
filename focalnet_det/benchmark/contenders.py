"""Other backbones to compare speed with; each needs its own library, none is required."""

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
    """One network in one setting.

    Attributes:
        name: what tables call it.
        module: its parameters.
        features: image batch in, feature maps out.
        channels_last: memory order of the images it wants.
        path: value of ``FOCALNET_DET_OPS`` while it runs, for ours.
        equal: it has the weights of ours and must give the same last feature map.
    """

    name: str
    module: nn.Module
    features: Features
    channels_last: bool = False
    path: str | None = None
    equal: bool = False


def focalnet(levels: int, window: int) -> FocalNet:
    """FocalNet-T without output norms and drop path; kernels ``window``, ``window + 2``, ..."""
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
    """Timm's FocalNet-T with the weights of ``net``. Raises: ImportError without timm."""
    from timm.models.focalnet import FocalNet as Peer

    peer: Any = Peer(num_classes=0, focal_levels=(levels,) * 4, focal_windows=(window,) * 4)
    _copy(net, peer, _timm_name)

    def features(x: Tensor) -> list[Tensor]:
        maps: Any = peer.forward_intermediates(x, intermediates_only=True)
        return list(maps)

    return peer, features


def transformers_focalnet(net: FocalNet, levels: int, window: int) -> tuple[nn.Module, Features]:
    """Hugging Face's FocalNet-T with the weights of ``net``; its last feature map alone.

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
    """Another backbone of timm with random weights. Raises: ImportError without timm."""
    import timm

    options: dict[str, Any] = {"img_size": size} if name.startswith("swin") else {}
    peer = timm.create_model(name, features_only=True, pretrained=False, **options)
    return peer, peer


def torchvision_swin() -> tuple[nn.Module, Features]:
    """Swin-T of torchvision with random weights; its four feature maps, channels last."""
    from torchvision.models import swin_t

    layers: Any = swin_t(weights=None).features

    def features(x: Tensor) -> list[Tensor]:
        maps = []
        for number, layer in enumerate(layers):
            x = layer(x)
            if number % 2:  # blocks; between them patches are merged
                maps.append(x)
        return maps

    return layers, features


def _timm_name(name: str) -> str:
    name = name.replace("patch_embed.", "stem.")
    # timm downsamples at the start of a stage, the official code and ours at the end.
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
    """Raises: KeyError if the peer lacks a parameter or has one that ours lacks."""
    skipped = ("head.", "norm.", "layernorm.", "embeddings.mask_token")
    target = {k: v for k, v in peer.state_dict().items() if not k.startswith(skipped)}
    source = {rename(name): value for name, value in net.state_dict().items()}
    if source.keys() != target.keys():
        raise KeyError(f"The peer's parameters differ: {sorted(source.keys() ^ target.keys())}.")
    for name, value in source.items():
        target[name].copy_(value.reshape(target[name].shape))
