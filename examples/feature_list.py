"""Use a FocalNet in code that expects a ``features_only`` model of timm."""

import torch

import focalnet_det
from focalnet_det.adapters import FeatureListBackbone

net = FeatureListBackbone(focalnet_det.create_backbone("focalnet_tiny_srf"))
features = net(torch.rand(1, 3, 224, 224))
for feature, stride in zip(features, net.feature_info.reduction(), strict=True):
    print(tuple(feature.shape), "stride", stride)
