"""RepPoints v2, Focal-T, BiFPN, 3x: published box AP 51.2 on COCO val.

The score is published, the config is not: recipe ours, that of the public Swin-T twin.
tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_multiscale
from ..common.models.reppoints_v2 import reppoints_v2
from ..common.optim import NO_DECAY_FOCAL, adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = reppoints_v2("focal_tiny", drop_path_rate=0.2)
dataloader = coco_multiscale(short_sides=tuple(range(480, 961, 32)), masks=False)
optimizer = adamw(lr=1e-4, weight_decay=0.05, no_decay_names=NO_DECAY_FOCAL)
schedule = multistep("3x")
train = run_options(precision="fp16", recipe_batch=16)
