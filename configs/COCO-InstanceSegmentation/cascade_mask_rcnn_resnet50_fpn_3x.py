"""Cascade Mask R-CNN, ResNet-50, FPN, 3x: the recipe of FocalNet-T, to compare with.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_instances
from ..common.models.cascade_mask_rcnn import cascade_mask_rcnn
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = cascade_mask_rcnn("resnet50")
dataloader, schedule = coco_instances(), multistep("3x")
optimizer = adamw(lr=1e-4, weight_decay=0.05)
train = run_options(precision="fp16", recipe_batch=16)
