"""Mask R-CNN, Focal-nano, FPN, on the generated shapes.

python datasets/make_shapes.py && tools/train_net.py --config-file <this file>
"""

from ..common.data.small import small_instances
from ..common.models.mask_rcnn import nano_mask_rcnn, pool_coarsely
from ..common.optim import NO_DECAY_FOCAL, adamw
from ..common.schedules import cosine
from ..common.train import run_options

_data = {"short_sides": (192,), "crop": 192, "test_size": 208, "batch_size": 2, "num_workers": 0}

model = pool_coarsely(nano_mask_rcnn("focal_nano", num_classes=6))
model.roi_heads.positive_fraction = 0.5
model.roi_heads.box_predictor.test_nms_thresh = 0.6  # the shapes overlap
dataloader = small_instances("shapes_train", "shapes_val", vertical_flip=True, **_data)
optimizer, schedule = adamw(lr=1e-3, no_decay_names=NO_DECAY_FOCAL), cosine(iterations=2200)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
train["checkpoint_period"] = 500
