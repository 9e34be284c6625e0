"""Masked image modeling, FocalNet-nano, on generated shapes or your own (--unlabeled-images).

python datasets/make_shapes.py && tools/train_net.py --config-file <this file>
"""

from ..common.data.classes import without_labels
from ..common.models.classifier import masked_images
from ..common.optim import adamw_matrices
from ..common.schedules import cosine
from ..common.train import run_options

_names = ("shapes_unlabeled_train", "shapes_unlabeled_val")

model = masked_images("focalnet_nano", mask_unit=16)
dataloader = without_labels(*_names, size=128, batch_size=16, num_workers=0)
optimizer, schedule = adamw_matrices(lr=1e-3), cosine(2000)
train = run_options(clip_norm=5.0, eval_period=0, checkpoint_period=500, seed=1)
train["period_unit"] = "iterations"
