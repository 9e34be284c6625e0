"""Mask R-CNN, Focal-T, FPN, 1x: published box AP 44.8, mask AP 41.0 on COCO val.

The scores are published, the configs are not: recipe ours, that of the same authors' FocalNet.
tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_instances
from ..common.models.mask_rcnn import mask_rcnn
from ..common.optim import NO_DECAY_FOCAL, adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = mask_rcnn("focal_tiny", drop_path_rate=0.1)
dataloader, schedule = coco_instances(), multistep("1x")
optimizer = adamw(lr=1e-4, weight_decay=0.05, no_decay_names=NO_DECAY_FOCAL)
train = run_options(precision="fp16", recipe_batch=16)
