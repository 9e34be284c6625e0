"""Focal networks as multi-scale backbones. Plain PyTorch, but for the Detectron2 adapter ``d2``."""

from .build import create_backbone
from .focalnet import FocalNet
from .stages import FeatureShape, StagedBackbone
from .variants import VARIANTS, FocalNetSpec, list_backbones, variant

__all__ = [
    "VARIANTS",
    "FeatureShape",
    "FocalNet",
    "FocalNetSpec",
    "StagedBackbone",
    "create_backbone",
    "list_backbones",
    "variant",
]
