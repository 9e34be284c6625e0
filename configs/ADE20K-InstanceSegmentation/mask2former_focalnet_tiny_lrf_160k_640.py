"""Mask2Former, FocalNet-T LRF, 160k, crops of 640: no score is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.mask2former import ade20k
from ..common.models.mask2former import NO_DECAY, mask2former
from ..common.optim import adamw
from ..common.schedules import poly
from ..common.train import run_options

model = mask2former("focalnet_tiny_lrf", num_classes=100, tasks=["instance"], size=640)
dataloader, schedule = ade20k("instance", crop=640), poly(160_000, 0, power=0.9)
optimizer = adamw(lr=1e-4, lr_factors={"backbone.": 0.1}, no_decay_names=NO_DECAY)
train = run_options(precision="fp16", recipe_batch=16, clip_norm=0.01, period_unit="iterations")
train.update(eval_period=5000, checkpoint_period=5000)
