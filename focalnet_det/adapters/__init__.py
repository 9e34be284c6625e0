"""Give the backbones the interfaces of libraries other than Detectron2."""

from .feature_list import FeatureInfo, FeatureListBackbone
from .torchvision_fpn import TorchvisionBackbone, torchvision_backbone

__all__ = ["FeatureInfo", "FeatureListBackbone", "TorchvisionBackbone", "torchvision_backbone"]
