"""Mask R-CNN, FocalNet-nano, FPN, on the generated shapes: what `make demo` trains."""

from ..common.data.small import small_instances
from ..common.models.mask_rcnn import nano_mask_rcnn, pool_coarsely
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import STATIC_DDP, run_options

# On two cores the demo's two processes leave none for loader processes. Boxes and
# masks are best a little above the resolution of the training (as classes, arXiv:1906.06423).
_data = {"short_sides": (192,), "crop": 192, "test_size": 208, "batch_size": 2, "num_workers": 0}

model = pool_coarsely(nano_mask_rcnn(num_classes=6))
model.roi_heads.positive_fraction = 0.5
model.roi_heads.box_predictor.test_nms_thresh = 0.6  # the shapes overlap
dataloader = small_instances("shapes_train", "shapes_val", vertical_flip=True, **_data)
optimizer, schedule = adamw(lr=1e-3), cosine(iterations=2200)
train = run_options(clip_norm=1.0, eval_period=0, period_unit="iterations", seed=1)
train |= {"checkpoint_period": 200, "ddp": STATIC_DDP}
