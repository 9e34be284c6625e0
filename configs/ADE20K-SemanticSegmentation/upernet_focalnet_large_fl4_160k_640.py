"""UPerNet, FocalNet-L FL4, 160k, crops of 640: no score is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.semantic import ade20k
from ..common.models.semantic import upernet
from ..common.optim import adamw
from ..common.schedules import poly
from ..common.train import run_options

model = upernet("focalnet_large_fl4", crop=640, drop_path_rate=0.3)
dataloader = ade20k(crop=640)
optimizer, schedule = adamw(lr=6e-5, weight_decay=0.01), poly(160_000)
train = run_options(
    recipe_batch=16, eval_period=16_000, checkpoint_period=16_000, period_unit="iterations"
)
