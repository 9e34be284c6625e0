"""UPerNet, Focal-T, 160k: published mIoU 45.8 on ADE20K val, 47.0 at several scales.

The scores are published, the configs are not: recipe ours, that of the same authors' FocalNet.
tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.semantic import ade20k
from ..common.models.semantic import upernet
from ..common.optim import NO_DECAY_FOCAL, adamw
from ..common.schedules import poly
from ..common.train import run_options

model = upernet("focal_tiny", drop_path_rate=0.3)
dataloader = ade20k()
optimizer = adamw(lr=6e-5, weight_decay=0.01, no_decay_names=NO_DECAY_FOCAL)
schedule = poly(160_000)
train = run_options(
    recipe_batch=16, eval_period=16_000, checkpoint_period=16_000, period_unit="iterations"
)
