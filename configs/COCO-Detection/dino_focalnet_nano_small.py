"""DINO, FocalNet-nano, 4-scale, for boxes on small machines and small data.

tools/train_net.py --config-file <this file> --coco-json train.json --images train --val-json ...
"""

from ..common.data.small import small_instances
from ..common.models.dino import NO_DECAY, nano_dino
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

model = nano_dino()
_sizes = {"short_sides": (320, 352, 384, 416, 448), "crop": 256, "test_size": 384}
dataloader = small_instances(
    "coco_2017_train", "coco_2017_val", batch_size=4, masks=False, **_sizes
)
optimizer = adamw(lr=1e-3, weight_decay=1e-4, no_decay_names=NO_DECAY)
schedule = cosine(iterations=3000)
train = run_options(eval_period=1000, checkpoint_period=500, period_unit="iterations")
train["clip_norm"] = 1.0
