"""DINO, FocalNet-nano, 4-scale, on the generated shapes.

python datasets/make_shapes.py && tools/train_net.py --config-file <this file>
"""

from ..common.data.small import small_instances
from ..common.models.dino import NO_DECAY, nano_dino
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

_data = {"short_sides": (160, 192, 224), "crop": 192, "test_size": 192, "batch_size": 4}

model = nano_dino(num_classes=6)
dataloader = small_instances("shapes_train", "shapes_val", masks=False, num_workers=0, **_data)
optimizer = adamw(lr=1e-3, weight_decay=1e-4, no_decay_names=NO_DECAY)
schedule = cosine(iterations=2000)
train = run_options(clip_norm=1.0, eval_period=500, period_unit="iterations", seed=1)
train["checkpoint_period"] = 500
