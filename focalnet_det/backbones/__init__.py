"""Provide focal networks as multi-scale backbones, in plain PyTorch."""

import importlib
import warnings
from typing import Any

from .build import build_backbone
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
    "build_backbone",
    "list_backbones",
    "variant",
]


def __getattr__(name: str) -> Any:
    if name != "create_backbone":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "focalnet_det.backbones.create_backbone is now focalnet_det.create_backbone.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module("focalnet_det"), name)
