"""DINO 5-scale, FocalNet-L FL4, 36 epochs: no score is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_boxes
from ..common.models.dino import NO_DECAY, large_dino
from ..common.optim import adamw
from ..common.schedules import multistep_iterations
from ..common.train import run_options

model = large_dino("focalnet_large_fl4", scales=5, drop_path_rate=0.4)
dataloader, schedule = coco_boxes(), multistep_iterations(270_000, (225_000,))
optimizer = adamw(
    lr=1e-4, weight_decay=1e-4, lr_factors={"backbone.": 0.1}, no_decay_names=NO_DECAY
)
train = run_options(recipe_batch=16, clip_norm=0.1, period_unit="iterations")
train.update(eval_period=7500, checkpoint_period=7500)
