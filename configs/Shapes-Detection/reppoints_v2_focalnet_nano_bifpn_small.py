"""RepPoints v2, FocalNet-nano, BiFPN, on the generated shapes.

python datasets/make_shapes.py && tools/train_net.py --config-file <this file>
"""

from ..common.data.small import small_instances
from ..common.models.reppoints_v2 import reppoints_v2
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

_data = {"short_sides": (192,), "crop": 192, "test_size": 192, "batch_size": 2, "num_workers": 0}

model = reppoints_v2("focalnet_nano", num_classes=6, channels=64, convs=2, repeats=1)
dataloader = small_instances("shapes_train", "shapes_val", masks=False, **_data)
optimizer, schedule = adamw(lr=1e-3), cosine(iterations=1400)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
train["checkpoint_period"] = 500
