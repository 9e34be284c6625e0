"""RepPoints v2, FocalNet-T LRF, BiFPN, 3x: no score is published.

Recipe ours: the public one of Swin-T, with FocalNet's kernels for COCO.
tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_multiscale
from ..common.models.reppoints_v2 import reppoints_v2
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = reppoints_v2("focalnet_tiny_lrf", focal_windows=(11, 9, 9, 7), drop_path_rate=0.2)
dataloader = coco_multiscale(short_sides=tuple(range(480, 961, 32)), masks=False)
optimizer, schedule = adamw(lr=1e-4, weight_decay=0.05), multistep("3x")
train = run_options(precision="fp16", recipe_batch=16)
