"""Mask2Former, FocalNet-L FL4, 100 epochs: 57.9 PQ is published (arXiv:2203.11926).

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.mask2former import coco_jitter
from ..common.models.mask2former import ALL_TASKS, COCO_THINGS, NO_DECAY, mask2former
from ..common.optim import adamw
from ..common.schedules import multistep_iterations
from ..common.train import run_options

model = mask2former("focalnet_large_fl4", num_classes=133, tasks=ALL_TASKS, queries=200, size=1024)
model.things = list(COCO_THINGS)
dataloader, schedule = coco_jitter("panoptic"), multistep_iterations(737_500, (655_556, 710_184))
optimizer = adamw(lr=1e-4, lr_factors={"backbone.": 0.1}, no_decay_names=NO_DECAY)
train = run_options(precision="fp16", recipe_batch=16, clip_norm=0.01, period_unit="iterations")
train.update(eval_period=5000, checkpoint_period=5000)
