"""DINO 5-scale, FocalNet-H FL4, images of up to 1200 x 2000, by FocalNet-DINO's conventions.

Published: box AP 64.3 on COCO val, from weights trained on Objects365. No config is public: recipe
ours, that of FocalNet-L.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<Objects365 weights>
"""

from ..common.data.coco import coco_boxes_high_resolution
from ..common.models.dino import large_dino
from ..common.optim import adamw
from ..common.schedules import multistep_iterations
from ..common.train import run_options

model = large_dino("focalnet_huge_fl4", scales=5, conventions="focalnet_dino")
dataloader, schedule = coco_boxes_high_resolution(), multistep_iterations(270_000, (225_000,))
optimizer = adamw(lr=1e-4, weight_decay=1e-4, lr_factors={"backbone.": 0.1}, no_decay_names=())
train = run_options(recipe_batch=16, clip_norm=0.1, period_unit="iterations")
train.update(eval_period=7500, checkpoint_period=7500)
