"""Semantic FPN on COCO's stuff (things as one class), FocalNet-T LRF, 1x: no score is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.panoptic import coco_stuff
from ..common.models.semantic import semantic_fpn
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

_backbone = {"focal_windows": (9, 9, 9, 9), "drop_path_rate": 0.1}
model = semantic_fpn("focalnet_tiny_lrf", num_classes=54, crop=0, **_backbone)
dataloader, schedule = coco_stuff(), multistep("1x")
optimizer = adamw(lr=1e-4, weight_decay=0.05)
train = run_options(precision="fp16", recipe_batch=16)
