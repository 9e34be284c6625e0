"""Semantic FPN, FocalNet-nano, on the generated shapes.

python datasets/make_shapes.py && tools/train_net.py --config-file <this file>
"""

from ..common.data.semantic import semantic
from ..common.models.semantic import semantic_fpn
from ..common.optim import adamw
from ..common.schedules import poly
from ..common.train import run_options

_data = {"short_side": 192, "long_side": 192, "ratios": (0.75, 1.25), "photometric": False}

model = semantic_fpn("focalnet_nano", num_classes=10, channels=64, head_channels=64, crop=128)
dataloader = semantic(
    "shapes_sem_seg_train", "shapes_sem_seg_val", crop=128, batch_size=8, num_workers=0, **_data
)
optimizer, schedule = adamw(lr=1e-3), poly(1000, warmup_iterations=100, warmup_factor=0.01)
train = run_options(clip_norm=1.0, eval_period=0, checkpoint_period=500, seed=1)
train["period_unit"] = "iterations"
