"""Mask2Former, FocalNet-L FL4, 100 epochs of large-scale jitter: no score is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.mask2former import coco_jitter
from ..common.models.mask2former import NO_DECAY, mask2former
from ..common.optim import adamw
from ..common.schedules import multistep_iterations
from ..common.train import run_options

model = mask2former(
    "focalnet_large_fl4", num_classes=80, tasks=["instance"], queries=200, size=1024
)
dataloader, schedule = coco_jitter("instance"), multistep_iterations(737_500, (655_556, 710_184))
optimizer = adamw(lr=1e-4, lr_factors={"backbone.": 0.1}, no_decay_names=NO_DECAY)
train = run_options(precision="fp16", recipe_batch=16, clip_norm=0.01, period_unit="iterations")
train.update(eval_period=5000, checkpoint_period=5000)
