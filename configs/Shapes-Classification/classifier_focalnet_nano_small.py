"""Classification, FocalNet-nano, on crops of the generated shapes, or your own (--class-images).

python datasets/make_shapes.py, python datasets/prepare_class_folders.py --shapes, then
tools/train_net.py --config-file <this file>
"""

from ..common.data.classes import images
from ..common.models.classifier import plain_classifier
from ..common.optim import adamw_matrices
from ..common.schedules import cosine
from ..common.train import run_options

_sizes = {"size": 64, "short_side": 64, "batch_size": 32, "num_workers": 0}
_names = ("shapes_classes_train", "shapes_classes_val")

model = plain_classifier("focalnet_nano", num_classes=6)
dataloader = images(*_names, scale=(0.5, 1.0), auto_augment="", **_sizes)
optimizer, schedule = adamw_matrices(lr=2e-3), cosine(600)
train = run_options(clip_norm=5.0, eval_period=0, checkpoint_period=200, seed=1)
train["period_unit"] = "iterations"
