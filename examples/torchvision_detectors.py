"""Use a FocalNet in the detectors of torchvision."""

import torch
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet

from focalnet_det.adapters import torchvision_backbone


def detectors(variant="focalnet_tiny_lrf", num_classes=91, **options):
    """Return Mask R-CNN, RetinaNet and FCOS on a variant; options go to the backbone."""
    backbone = torchvision_backbone(variant, **options)
    mask_rcnn = MaskRCNN(backbone, num_classes)
    # These two begin at stride 8, and have two more levels.
    retinanet = RetinaNet(torchvision_backbone(variant, top="p6p7", **options), num_classes)
    fcos = FCOS(torchvision_backbone(variant, top="p6p7", **options), num_classes)
    return mask_rcnn, retinanet, fcos


if __name__ == "__main__":
    for model in detectors():
        found = model.eval()([torch.rand(3, 480, 640)])[0]
        print(type(model).__name__, {name: tuple(value.shape) for name, value in found.items()})
