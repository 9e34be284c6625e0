"""Backbones by name, so that a recipe can be run with any of them."""

from detectron2.config import LazyCall as L

from focalnet_det.backbones.peers import SwinBackbone, resnet_backbone
from focalnet_det.detectron2.backbone import focalnet_backbone


def backbone_of(name, *, first_stage=1, **options):
    """A FocalNet or Focal Transformer, "swin_tiny" or "resnet50"; options go to its constructor.

    first_stage: leave out features finer than it; 2 begins at stride 8.
    """
    stages = range(first_stage, 5)
    if name == "resnet50":
        return L(resnet_backbone)(out_features=[f"res{k + 1}" for k in stages], **options)
    names = [f"stage{k}" for k in stages]
    if name == "swin_tiny":
        return L(SwinBackbone)(out_features=names, **options)
    if first_stage > 1:
        options["out_features"] = names
    return L(focalnet_backbone)(variant=name, **options)
