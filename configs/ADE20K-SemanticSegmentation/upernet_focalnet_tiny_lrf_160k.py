"""UPerNet, FocalNet-T LRF, 160k: published mIoU 46.8 on ADE20K val, 47.8 at several scales.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.semantic import ade20k
from ..common.models.semantic import upernet
from ..common.optim import adamw
from ..common.schedules import poly
from ..common.train import run_options

model = upernet("focalnet_tiny_lrf", focal_windows=(9, 9, 9, 9), drop_path_rate=0.3)
dataloader = ade20k()
optimizer, schedule = adamw(lr=6e-5, weight_decay=0.01), poly(160_000)
train = run_options(
    recipe_batch=16, eval_period=16_000, checkpoint_period=16_000, period_unit="iterations"
)
