"""Mask2Former, FocalNet-nano, instances, on the generated shapes, for machines without a GPU.

tools/train_net.py --config-file <this file>
"""

from ..common.data.mask2former import crops
from ..common.models.mask2former import NO_DECAY, nano_mask2former
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

model = nano_mask2former(num_classes=6, tasks=["instance"], size=192)
dataloader = crops("shapes_train", "shapes_val", masks=True, crop=192, batch_size=4, num_workers=2)
dataloader["train"].augmentations.update(ratios=(0.8, 1.25), photometric=False)
optimizer, schedule = adamw(lr=1e-3, no_decay_names=NO_DECAY), cosine(iterations=1000)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
