"""Focal networks as multi-scale backbones. Plain PyTorch, but for the Detectron2 adapter ``d2``."""

from .build import create_backbone
from .focal_transformer import FocalTransformer, FocalTransformerV2
from .focalnet import FocalNet
from .stages import FeatureShape, StagedBackbone
from .variants import (
    FOCAL_TRANSFORMERS,
    FOCALNETS,
    VARIANTS,
    BackboneSpec,
    FocalNetSpec,
    FocalTransformerSpec,
    FocalTransformerV2Spec,
    list_backbones,
    variant,
)

__all__ = [
    "FOCALNETS",
    "FOCAL_TRANSFORMERS",
    "VARIANTS",
    "BackboneSpec",
    "FeatureShape",
    "FocalNet",
    "FocalNetSpec",
    "FocalTransformer",
    "FocalTransformerSpec",
    "FocalTransformerV2",
    "FocalTransformerV2Spec",
    "StagedBackbone",
    "create_backbone",
    "list_backbones",
    "variant",
]
