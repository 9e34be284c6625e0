"""Mask R-CNN, FocalNet-T LRF, FPN, 3x: published box AP 48.0, mask AP 42.9 on COCO val.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_instances
from ..common.models.mask_rcnn import mask_rcnn
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = mask_rcnn("focalnet_tiny_lrf", focal_windows=(9, 9, 9, 9), drop_path_rate=0.3)
dataloader, schedule = coco_instances(), multistep("3x")
optimizer = adamw(lr=1e-4, weight_decay=0.05)
train = run_options(precision="fp16", recipe_batch=16)
