"""Mask R-CNN, FocalNet-nano, FPN, on the generated shapes: what `make demo` trains."""

from ..common.data.small import small_instances
from ..common.models.mask_rcnn import nano_mask_rcnn
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

model = nano_mask_rcnn(num_classes=6)
dataloader = small_instances(
    "shapes_train", "shapes_val", short_sides=(192,), crop=192, test_size=192, batch_size=8
)
optimizer, schedule = adamw(lr=1e-3), cosine(iterations=700)
train = run_options(eval_period=0, checkpoint_period=200, period_unit="iterations", seed=1)
