"""UPerNet, Focal-nano, for small machines and small data (see README: your own data).

tools/train_net.py --config-file <this file> --sem-images train --sem-labels train_labels ...
"""

from ..common.data.semantic import semantic
from ..common.models.semantic import upernet
from ..common.optim import NO_DECAY_FOCAL, adamw
from ..common.schedules import poly
from ..common.train import run_options

_sizes = {"crop": 256, "short_side": 320, "long_side": 860, "ratios": (0.75, 1.5)}

model = upernet("focal_nano", channels=48, crop=256)
model.loss.average = "valid"
dataloader = semantic(
    "ade20k_sem_seg_train", "ade20k_sem_seg_val", batch_size=4, num_workers=2, **_sizes
)
optimizer = adamw(lr=1e-3, no_decay_names=NO_DECAY_FOCAL)
schedule = poly(6000, warmup_iterations=200, warmup_factor=0.01)
train = run_options(clip_norm=1.0, eval_period=1000, checkpoint_period=500)
train["period_unit"] = "iterations"
