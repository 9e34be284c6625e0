"""Panoptic FPN, FocalNet-nano, on the generated shapes, for machines without a GPU.

tools/train_net.py --config-file <this file>
"""

from ..common.data.small import small_instances
from ..common.models.mask_rcnn import pool_coarsely
from ..common.models.panoptic_fpn import nano_panoptic_fpn
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

_data = {"short_sides": (192,), "crop": 192, "test_size": 192, "batch_size": 2}

model = nano_panoptic_fpn(num_classes=6, num_stuff=5, stuff_area=1000)
pool_coarsely(model)
model.sem_seg_head.loss_weight = 1.0
model.roi_heads.positive_fraction = 0.5
dataloader = small_instances("shapes_panoptic_train", "shapes_panoptic_val", **_data)
optimizer, schedule = adamw(lr=1.5e-3), cosine(iterations=1000)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
train["checkpoint_period"] = 300
