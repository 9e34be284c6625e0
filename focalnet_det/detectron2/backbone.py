"""Detectron2 adapter: the backbones as Detectron2 ``Backbone``s, and their registry entries."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..compat import apply_shims, feature_shape, require_detectron2

require_detectron2()
apply_shims()

from detectron2.config import CfgNode  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, Backbone  # noqa: E402

from ..backbones.build import arguments_of, backbone_arguments, backbone_class  # noqa: E402
from ..backbones.focal_transformer import FocalTransformer, FocalTransformerV2  # noqa: E402
from ..backbones.focalnet import FocalNet  # noqa: E402
from ..backbones.stages import StagedBackbone  # noqa: E402
from ..layers.padded_batch import current_batch  # noqa: E402
from ..necks.fpn import build_fpn, build_retinanet_fpn  # noqa: E402


class ComputedFeatures(dict[str, Tensor]):
    """Features in place of images, for a neck that is to go on from them."""


class StagedDetectron2Backbone(StagedBackbone, Backbone):
    """A backbone with Detectron2's interface; parameter names stay the official ones."""

    # The network pads what its strides do not divide; a neck on top states its own needs.
    size_divisibility = 0

    def forward(
        self,
        x: Tensor | ComputedFeatures,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor]:
        """Return the features of a batch of images, see :class:`StagedBackbone`.

        Args:
            x: (N, C, H, W), or features that are returned as they are.
            image_sizes: (height, width) of each image in pixels, without its padding. With
                ``valid_context`` the default is those of the current batch, which
                `ignore_batch_padding` gives in every call of a model.
        Raises: ValueError if ``valid_context`` has no sizes.
        """
        if isinstance(x, ComputedFeatures):
            return x
        if self.valid_context and image_sizes is None:
            batch = current_batch()
            if batch is None:
                raise ValueError(
                    "This backbone was built with valid_context=True: call it with image_sizes, "
                    "or prepare its detector with "
                    "focalnet_det.heads.batch_padding.ignore_batch_padding(model)."
                )
            image_sizes = batch.image_sizes
        return super().forward(x, image_sizes)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each returned feature, as Detectron2 wants them."""
        return {
            name: feature_shape(channels=shape.channels, stride=shape.stride)
            for name, shape in super().output_shape().items()
        }


class FocalNetBackbone(FocalNet, StagedDetectron2Backbone):
    """:class:`FocalNet` for Detectron2."""


class FocalTransformerBackbone(FocalTransformer, StagedDetectron2Backbone):
    """:class:`FocalTransformer` for Detectron2."""


class FocalTransformerV2Backbone(FocalTransformerV2, StagedDetectron2Backbone):
    """:class:`FocalTransformerV2` for Detectron2."""


ADAPTERS: dict[type[StagedBackbone], type[StagedDetectron2Backbone]] = {
    FocalNet: FocalNetBackbone,
    FocalTransformer: FocalTransformerBackbone,
    FocalTransformerV2: FocalTransformerV2Backbone,
}


def focalnet_backbone(variant: str, **overrides: Any) -> StagedDetectron2Backbone:
    """A variant by name for LazyConfig: ``L(focalnet_backbone)(variant="focalnet_tiny_lrf")``.

    Raises: KeyError for an unknown variant, TypeError for an unknown option.
    """
    arguments = backbone_arguments(variant, **overrides)
    return ADAPTERS[backbone_class(variant)](**arguments)


# Node of a config: default variant, and the classes whose arguments are its keys.
NODES: dict[str, tuple[str, tuple[type[StagedBackbone], ...]]] = {
    "FOCALNET": ("focalnet_tiny_srf", (FocalNet,)),
    "FOCAL_TRANSFORMER": ("focal_tiny", (FocalTransformer, FocalTransformerV2)),
}


def add_backbone_config(cfg: CfgNode) -> None:
    """Add ``MODEL.FOCALNET`` and ``MODEL.FOCAL_TRANSFORMER``: ``VARIANT`` and overrides.

    There is one key per constructor argument; None keeps what the row of the variant says.
    """
    for name, (variant, classes) in NODES.items():
        node = CfgNode({"VARIANT": variant})
        for argument in dict.fromkeys(a for c in classes for a in arguments_of(c)):
            # The image channels are those of MODEL.PIXEL_MEAN, as in every Detectron2 backbone.
            if argument != "in_channels":
                node[argument.upper()] = None
        cfg.MODEL[name] = node


@BACKBONE_REGISTRY.register()
def build_focalnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StagedDetectron2Backbone:
    """FocalNet from ``MODEL.FOCALNET``; ``MODEL.BACKBONE.FREEZE_AT`` is not read."""
    return _backbone_from_config(cfg, input_shape, "FOCALNET")


@BACKBONE_REGISTRY.register()
def build_focal_transformer_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> StagedDetectron2Backbone:
    """Build a Focal Transformer from ``MODEL.FOCAL_TRANSFORMER``, as the FocalNet above."""
    return _backbone_from_config(cfg, input_shape, "FOCAL_TRANSFORMER")


def _backbone_from_config(
    cfg: CfgNode, input_shape: ShapeSpec, name: str, **defaults: Any
) -> StagedDetectron2Backbone:
    node = cfg.MODEL[name]
    overrides = {key.lower(): value for key, value in node.items() if value is not None}
    variant = overrides.pop("variant")
    return focalnet_backbone(variant, in_channels=input_shape.channels, **defaults | overrides)


def _bottom_up(cfg: CfgNode, input_shape: ShapeSpec, name: str) -> StagedDetectron2Backbone:
    # DistributedDataParallel refuses parameters without gradient: no norms of unread outputs.
    wanted = cfg.MODEL.FPN.IN_FEATURES or None
    return _backbone_from_config(cfg, input_shape, name, out_features=wanted)


def _fpn(cfg: CfgNode, input_shape: ShapeSpec, name: str) -> Backbone:
    return build_fpn(
        _bottom_up(cfg, input_shape, name),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _retinanet_fpn(cfg: CfgNode, input_shape: ShapeSpec, name: str) -> Backbone:
    return build_retinanet_fpn(
        _bottom_up(cfg, input_shape, name),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        p7_relu=cfg.MODEL.get("CONVENTIONS") != "mmdet",
    )


@BACKBONE_REGISTRY.register()
def build_focalnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """FocalNet with FPN, p2..p6, for R-CNN, semantic and panoptic FPN."""
    return _fpn(cfg, input_shape, "FOCALNET")


@BACKBONE_REGISTRY.register()
def build_retinanet_focalnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """FocalNet with FPN, p3..p7, for RetinaNet; ``MODEL.CONVENTIONS`` decides on P7's ReLU."""
    return _retinanet_fpn(cfg, input_shape, "FOCALNET")


@BACKBONE_REGISTRY.register()
def build_focal_transformer_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a Focal Transformer with FPN, p2..p6."""
    return _fpn(cfg, input_shape, "FOCAL_TRANSFORMER")


@BACKBONE_REGISTRY.register()
def build_retinanet_focal_transformer_fpn_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> Backbone:
    """Build a Focal Transformer with FPN, p3..p7."""
    return _retinanet_fpn(cfg, input_shape, "FOCAL_TRANSFORMER")
