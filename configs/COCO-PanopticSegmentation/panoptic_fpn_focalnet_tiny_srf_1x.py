"""Panoptic FPN, FocalNet-T SRF, 1x, with Mask R-CNN's published recipe: no score is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.panoptic import coco_panoptic
from ..common.models.panoptic_fpn import panoptic_fpn
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = panoptic_fpn("focalnet_tiny_srf", focal_windows=(9, 9, 9, 9), drop_path_rate=0.1)
dataloader, schedule = coco_panoptic(), multistep("1x")
optimizer = adamw(lr=1e-4, weight_decay=0.05)
train = run_options(precision="fp16", recipe_batch=16)
