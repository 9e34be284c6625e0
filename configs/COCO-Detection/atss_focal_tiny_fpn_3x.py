"""ATSS, Focal-T, FPN, 3x: published box AP 49.5 on COCO val.

The scores are published, the configs are not: recipe ours, that of the same authors' FocalNet.
tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_instances
from ..common.models.atss import atss
from ..common.optim import NO_DECAY_FOCAL, adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = atss("focal_tiny", drop_path_rate=0.3)
dataloader, schedule = coco_instances(masks=False), multistep("3x")
optimizer = adamw(lr=1e-4, weight_decay=0.05, no_decay_names=NO_DECAY_FOCAL)
train = run_options(precision="fp16", recipe_batch=16)
