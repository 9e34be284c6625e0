"""Adapt the backbones to Detectron2's ``Backbone`` interface, and register them."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..compat import apply_shims, feature_shape, require_detectron2

require_detectron2()
apply_shims()

from detectron2.config import CfgNode  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, Backbone  # noqa: E402

from ..backbones.build import backbone_arguments, backbone_class, constructor_arguments  # noqa: E402
from ..backbones.focal_transformer import FocalTransformer, FocalTransformerV2  # noqa: E402
from ..backbones.focalnet import FocalNet  # noqa: E402
from ..backbones.stages import StagedBackbone  # noqa: E402
from ..layers.padded_batch import current_batch  # noqa: E402
from ..necks.bifpn import BiFPN  # noqa: E402
from ..necks.fpn import build_fpn, build_retinanet_fpn  # noqa: E402
from .feature_shapes import C4_ADVICE, FeatureShapes  # noqa: E402

logger = logging.getLogger("focalnet_det")


class ComputedFeatures(dict[str, Tensor]):
    """Features that are passed to a backbone instead of images, and returned unchanged.

    They let a neck process features that were computed, and cropped, before.
    """


class StagedDetectron2Backbone(StagedBackbone, Backbone):
    """A backbone with Detectron2's interface; parameter names are the official ones."""

    # Any size works: the backbone pads its input. A neck on top has its own divisibility.
    size_divisibility = 0

    def forward(
        self,
        x: Tensor | ComputedFeatures,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the features of a batch of images, see :class:`StagedBackbone`.

        Args:
            x: (N, in_channels, H, W), or features to return unchanged.
            image_sizes: (height, width) of each image without its padding, pixels. The default
                with ``valid_context`` are the sizes of the current batch, which
                `ignore_batch_padding` provides in every call of a model.
        Returns: {name: (N, C, ceil(H / stride), ceil(W / stride))}.
        Raises: ValueError if ``valid_context`` is set and no sizes are known.
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
        """Return channels and stride of each output feature as Detectron2's ``ShapeSpec``."""
        return FeatureShapes(
            {
                name: feature_shape(channels=shape.channels, stride=shape.stride)
                for name, shape in super().output_shape().items()
            }
        )


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
    """Build a variant by name, for LazyConfig: ``L(focalnet_backbone)(variant="focalnet_nano")``.

    Args:
        variant: see :func:`focalnet_det.list_backbones`.
        overrides: constructor arguments that replace those of the variant.
    Raises: KeyError for an unknown variant, TypeError for an unknown option, ValueError for invalid
        values.
    """
    arguments = backbone_arguments(variant, **overrides)
    return ADAPTERS[backbone_class(variant)](**arguments)


# Config node -> default variant, and the classes whose constructor arguments are its keys.
CONFIG_NODES: dict[str, tuple[str, tuple[type[StagedBackbone], ...]]] = {
    "FOCALNET": ("focalnet_tiny_srf", (FocalNet,)),
    "FOCAL_TRANSFORMER": ("focal_tiny", (FocalTransformer, FocalTransformerV2)),
}


def add_backbone_config(cfg: CfgNode) -> None:
    """Add ``MODEL.FOCALNET`` and ``MODEL.FOCAL_TRANSFORMER``: ``VARIANT`` and overrides.

    There is one key per constructor argument; None selects the value of the variant. Also adds
    ``MODEL.FPN.P6_FROM`` and ``MODEL.BIFPN``.
    """
    for name, (variant, classes) in CONFIG_NODES.items():
        node = CfgNode({"VARIANT": variant})
        for argument in dict.fromkeys(a for c in classes for a in constructor_arguments(c)):
            # The number of image channels is that of MODEL.PIXEL_MEAN, as always in Detectron2.
            if argument != "in_channels":
                node[argument.upper()] = None
        cfg.MODEL[name] = node
    # Of the BiFPN: number of bidirectional passes.
    cfg.MODEL.BIFPN = CfgNode({"REPEATS": 2})
    # Of the FPN with p6 and p7: "backbone" for its last feature, or "p5".
    cfg.MODEL.FPN.P6_FROM = "backbone"


@BACKBONE_REGISTRY.register()
def build_focalnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StagedDetectron2Backbone:
    """Build a FocalNet from ``MODEL.FOCALNET``; ``MODEL.BACKBONE.FREEZE_AT`` is not read."""
    return _backbone_from_config(cfg, input_shape, "FOCALNET")


@BACKBONE_REGISTRY.register()
def build_focal_transformer_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> StagedDetectron2Backbone:
    """Build a Focal Transformer; ``MODEL.BACKBONE.FREEZE_AT`` is not read."""
    return _backbone_from_config(cfg, input_shape, "FOCAL_TRANSFORMER")


def _backbone_from_config(
    cfg: CfgNode, input_shape: ShapeSpec, name: str, **defaults: Any
) -> StagedDetectron2Backbone:
    if name not in cfg.MODEL:
        raise KeyError(
            f"The config has no MODEL.{name}: call focalnet_det.add_focalnet_config(cfg) before "
            "reading the config of the project."
        )
    node = cfg.MODEL[name]
    overrides = {key.lower(): value for key, value in node.items() if value is not None}
    variant = overrides.pop("variant")
    return focalnet_backbone(variant, in_channels=input_shape.channels, **defaults | overrides)


def is_c4(cfg: CfgNode) -> bool:
    """Tell whether a config is one of an R-CNN without FPN, whose head is a stage of a ResNet."""
    is_rcnn = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "MmdetRCNN")
    return is_rcnn and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads"


def _bottom_up(cfg: CfgNode, input_shape: ShapeSpec, name: str) -> StagedDetectron2Backbone:
    # Only the outputs that the FPN uses: DistributedDataParallel refuses norms without gradients.
    out_features = cfg.MODEL.FPN.IN_FEATURES or None
    return _backbone_from_config(cfg, input_shape, name, out_features=out_features)


def _fpn(cfg: CfgNode, input_shape: ShapeSpec, name: str) -> Backbone:
    if is_c4(cfg):
        # No error: it is Detectron2's default, with which a backbone alone may be built.
        logger.warning("MODEL.ROI_HEADS.NAME is Res5ROIHeads. %s", C4_ADVICE)
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
        p6_from=cfg.MODEL.FPN.P6_FROM,
        p7_relu=cfg.MODEL.get("CONVENTIONS") != "mmdet",
    )


def _bifpn(cfg: CfgNode, input_shape: ShapeSpec, name: str) -> Backbone:
    return BiFPN(
        bottom_up=_bottom_up(cfg, input_shape, name),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        repeats=cfg.MODEL.BIFPN.REPEATS,
    )


@BACKBONE_REGISTRY.register()
def build_focalnet_bifpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a FocalNet with BiFPN, p3..p7, for RepPoints v2."""
    return _bifpn(cfg, input_shape, "FOCALNET")


@BACKBONE_REGISTRY.register()
def build_focal_transformer_bifpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a Focal Transformer with BiFPN, p3..p7, for RepPoints v2."""
    return _bifpn(cfg, input_shape, "FOCAL_TRANSFORMER")


@BACKBONE_REGISTRY.register()
def build_focalnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a FocalNet with FPN, p2..p6, for R-CNN, semantic and panoptic FPN."""
    return _fpn(cfg, input_shape, "FOCALNET")


@BACKBONE_REGISTRY.register()
def build_retinanet_focalnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a FocalNet with FPN, p3..p7, for RetinaNet and ATSS.

    ``MODEL.FPN.P6_FROM`` is the input of p6, ``MODEL.CONVENTIONS`` decides whether there is a ReLU
    before p7.
    """
    return _retinanet_fpn(cfg, input_shape, "FOCALNET")


@BACKBONE_REGISTRY.register()
def build_focal_transformer_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a Focal Transformer with FPN, p2..p6, for R-CNN, semantic and panoptic FPN."""
    return _fpn(cfg, input_shape, "FOCAL_TRANSFORMER")


@BACKBONE_REGISTRY.register()
def build_retinanet_focal_transformer_fpn_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> Backbone:
    """Build a Focal Transformer with FPN, p3..p7, for RetinaNet; see the FocalNet's."""
    return _retinanet_fpn(cfg, input_shape, "FOCAL_TRANSFORMER")
