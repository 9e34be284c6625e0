"""ATSS, FocalNet-nano, FPN, on the generated shapes.

python datasets/make_shapes.py && tools/train_net.py --config-file <this file>
"""

from ..common.data.small import small_instances
from ..common.models.atss import atss
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

_data = {"short_sides": (192,), "crop": 192, "test_size": 192, "batch_size": 2, "num_workers": 0}
_small = {"channels": 64, "norm": "GN", "convs": 2, "anchor_size": 32}

model = atss("focalnet_nano", num_classes=6, **_small)
dataloader = small_instances("shapes_train", "shapes_val", masks=False, **_data)
optimizer, schedule = adamw(lr=1e-3), cosine(iterations=2200)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
train["checkpoint_period"] = 500
