"""Mask R-CNN for small data on a backbone of timm: a config of one's own.

focalnet-det train --config-file examples/mask_rcnn_resnet18_timm.py --coco-json train.json ...
"""

from detectron2.config import LazyCall as L

from focalnet_det.detectron2.library_backbones import timm_backbone
from focalnet_det.experiment import recipe

base = recipe("COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py")
model, dataloader, train = base.model, base.dataloader, base.train
optimizer, schedule = base.optimizer, base.schedule

model.backbone.bottom_up = L(timm_backbone)(name="resnet18", pretrained=False)
