"""Adapt the backbones of timm and Hugging Face, so that every neck and head here runs on them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..compat import feature_shape
from ..layers.patch_embed import pad_to_multiple
from .feature_shapes import FeatureShapes

# The finest feature that necks read; ResNets also return one of stride 2.
FINEST_STRIDE = 4


class LibraryBackbone(Backbone):
    """A network of another library with the interface of our backbones.

    Features are named by their stride, ``stageK`` for ``2**(K+1)``, whatever the library calls
    them. Any image size works: images are padded to a multiple of the largest stride, and features
    cropped, so that a map has ceil(H / stride) rows as with our own backbones.

    Args:
        net: network.
        maps: makes the list of feature maps of its output.
        shapes: channels and stride of each map, in their order; of several maps with one stride the
            last is taken.
        out_features: names of the features to return, None for all.
    Raises: ValueError for an unknown feature, or strides that are no powers of two.
    """

    # Any size works, see above.
    size_divisibility = 0

    def __init__(
        self,
        net: nn.Module,
        maps: Callable[[Any], Sequence[Tensor]],
        shapes: Sequence[tuple[int, int]],
        out_features: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.net, self._maps = net, maps
        found = {
            _stage_name(stride): i
            for i, (_, stride) in enumerate(shapes)
            if stride >= FINEST_STRIDE
        }
        unknown = sorted(set(out_features or ()) - set(found))
        if unknown:
            raise ValueError(f"This backbone has no {', '.join(unknown)}; it has {list(found)}.")
        self._indices = {n: i for n, i in found.items() if n in (out_features or found)}
        self._shapes = {name: shapes[i] for name, i in self._indices.items()}
        self._padding = max(stride for _, stride in shapes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (N, C, H, W) to {name: (N, C', ceil(H / stride), ceil(W / stride))}."""
        height, width = x.shape[-2:]
        maps = self._maps(self.net(pad_to_multiple(x, self._padding)))
        features = {}
        for name, index in self._indices.items():
            channels, stride = self._shapes[name]
            feature = maps[index]
            if feature.shape[1] != channels:  # channels last, as some transformers return them
                feature = feature.permute(0, 3, 1, 2)
            rows, columns = -(-height // stride), -(-width // stride)
            features[name] = feature[..., :rows, :columns]
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each feature."""
        return FeatureShapes(
            {n: feature_shape(channels=c, stride=s) for n, (c, s) in self._shapes.items()}
        )


def _stage_name(stride: int) -> str:
    exponent = math.log2(stride)
    if exponent != int(exponent):
        raise ValueError(f"A feature has stride {stride}; necks need powers of two.")
    return f"stage{int(exponent) - 1}"


def timm_backbone(
    name: str,
    *,
    pretrained: bool = False,
    out_features: Sequence[str] | None = None,
    frozen_batch_norm: bool = False,
    **options: Any,
) -> LibraryBackbone:
    """Build a backbone of timm, for LazyConfig: ``L(timm_backbone)(name="resnet50")``.

    Args:
        name: of a model that timm can build with ``features_only=True``.
        pretrained: download timm's weights.
        out_features: names from ``stage1`` .. ``stage4``, None for all.
        frozen_batch_norm: replace batch norms by frozen ones, as Detectron2's ResNets have them.
        options: of ``timm.create_model``.
    Raises: ImportError without timm, ValueError as :class:`LibraryBackbone`.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("Backbones of timm need timm: pip install timm.") from error
    net: Any = timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    info = net.feature_info
    shapes = list(zip(info.channels(), info.reduction(), strict=True))
    if frozen_batch_norm:
        net = FrozenBatchNorm2d.convert_frozen_batchnorm(net)
    return LibraryBackbone(net, list, shapes, out_features)


def huggingface_backbone(
    name: str,
    *,
    pretrained: bool = False,
    out_features: Sequence[str] | None = None,
    **config: Any,
) -> LibraryBackbone:
    """Build a backbone of transformers: ``L(huggingface_backbone)(name="convnextv2")``.

    Args:
        name: type of the model, such as "resnet" or "swin"; with ``pretrained`` the name or folder
            of a model.
        pretrained: load the weights of that model.
        out_features: names from ``stage1`` .. ``stage4``, by stride, None for all. The library
            itself counts stages in other ways.
        config: fields of the model's config, such as ``depths``.
    Raises: ImportError without transformers, ValueError as :class:`LibraryBackbone`.
    """
    try:
        from transformers import AutoBackbone, AutoConfig
    except ImportError as error:
        raise ImportError("These backbones need transformers: pip install transformers.") from error
    # Lists of a LazyConfig are no lists to the library.
    fields = {
        k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
        for k, v in config.items()
    }
    make_config = AutoConfig.from_pretrained if pretrained else AutoConfig.for_model
    base = make_config(name, **fields)
    # All stages: unless it is asked for them, the library returns the last one alone.
    base.out_features = list(base.stage_names)
    if pretrained:
        net = AutoBackbone.from_pretrained(name, config=base)
    else:
        net = AutoBackbone.from_config(base)
    return LibraryBackbone(net, _feature_maps, _measured_shapes(net), out_features)


def _feature_maps(output: Any) -> Sequence[Tensor]:
    maps: Sequence[Tensor] = output.feature_maps
    return maps


def _measured_shapes(net: nn.Module) -> list[tuple[int, int]]:
    """Return channels and stride of each map: the configs of the library do not give strides."""
    side = 224
    parameter = next(net.parameters())
    was_training = net.training
    with torch.no_grad():
        image = torch.zeros(1, getattr(net.config, "num_channels", 3), side, side)
        maps = _feature_maps(net.eval()(image.to(parameter)))
    net.train(was_training)
    return [(m.shape[1], round(side / m.shape[-1])) for m in maps]
