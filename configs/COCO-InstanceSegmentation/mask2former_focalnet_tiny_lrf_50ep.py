"""Mask2Former, FocalNet-T LRF, 50 epochs of large-scale jitter: no score is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.mask2former import coco_jitter
from ..common.models.mask2former import NO_DECAY, mask2former
from ..common.optim import adamw
from ..common.schedules import multistep_iterations
from ..common.train import run_options

model = mask2former("focalnet_tiny_lrf", num_classes=80, tasks=["instance"], size=1024)
dataloader, schedule = coco_jitter("instance"), multistep_iterations(368_750, (327_778, 355_092))
optimizer = adamw(lr=1e-4, lr_factors={"backbone.": 0.1}, no_decay_names=NO_DECAY)
train = run_options(precision="fp16", recipe_batch=16, clip_norm=0.01, period_unit="iterations")
train.update(eval_period=5000, checkpoint_period=5000)
