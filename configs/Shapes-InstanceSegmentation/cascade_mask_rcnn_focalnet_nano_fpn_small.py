"""Cascade Mask R-CNN, FocalNet-nano, FPN, on the generated shapes.

python datasets/make_shapes.py && tools/train_net.py --config-file <this file>
"""

from ..common.data.small import small_instances
from ..common.models.cascade_mask_rcnn import nano_cascade_mask_rcnn
from ..common.models.mask_rcnn import pool_coarsely
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

_data = {"short_sides": (192,), "crop": 192, "test_size": 192, "batch_size": 2, "num_workers": 0}

model = pool_coarsely(nano_cascade_mask_rcnn(num_classes=6))
model.roi_heads.positive_fraction = 0.5
dataloader = small_instances("shapes_train", "shapes_val", **_data)
optimizer, schedule = adamw(lr=1.5e-3), cosine(iterations=700)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
train["checkpoint_period"] = 300
