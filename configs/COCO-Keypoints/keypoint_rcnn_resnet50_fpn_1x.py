"""Keypoint R-CNN, ResNet-50, FPN, 1x. No number is published for this recipe.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_keypoints
from ..common.models.keypoint_rcnn import keypoint_rcnn
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = keypoint_rcnn("resnet50")
dataloader, schedule = coco_keypoints(), multistep("1x")
optimizer = adamw(lr=1e-4, weight_decay=0.05)
train = run_options(precision="fp16", recipe_batch=16)
