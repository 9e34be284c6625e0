"""ATSS, FocalNet-T LRF, FPN, 3x: published box AP 49.6 on COCO val.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_instances
from ..common.models.atss import atss
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = atss("focalnet_tiny_lrf", focal_windows=(11, 9, 9, 7), drop_path_rate=0.3)
dataloader, schedule = coco_instances(masks=False), multistep("3x")
optimizer = adamw(lr=1e-4, weight_decay=0.05)
train = run_options(precision="fp16", recipe_batch=16)
