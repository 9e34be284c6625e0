"""Mask2Former, FocalNet-nano, panoptic, on the generated shapes, for machines without a GPU.

tools/train_net.py --config-file <this file>
"""

from ..common.data.mask2former import crops
from ..common.models.mask2former import ALL_TASKS, NO_DECAY, nano_mask2former
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

model = nano_mask2former(num_classes=10, tasks=ALL_TASKS, things=range(6), size=128)
model.weights = [15.0, 5.0, 5.0]  # stuff differs in texture alone, which few labels must teach
_sets = [f"shapes_panoptic_{split}_unified" for split in ("train", "val")]
dataloader = crops(*_sets, masks=True, crop=192, batch_size=8, num_workers=2)
dataloader["train"].augmentations.update(crop=128, ratios=(1.2, 1.9), photometric=False)
optimizer, schedule = adamw(lr=1.5e-3, no_decay_names=NO_DECAY), cosine(iterations=1000)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
