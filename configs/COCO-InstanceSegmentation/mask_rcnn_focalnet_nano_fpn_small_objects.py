"""Mask R-CNN, FocalNet-nano, FPN, for many small objects an image: cells, fruit, aerial views.

tools/train_net.py --config-file <this file> --coco-json train.json --images train --val-json ...
"""

from ..common.data.small import small_instances
from ..common.models.mask_rcnn import nano_mask_rcnn
from ..common.optim import adamw
from ..common.schedules import cosine
from ..common.train import run_options

model = nano_mask_rcnn(anchor_size=8, rois=128, proposals=500, detections=500, embed_dim=48)
_sizes = {"short_sides": (320, 352, 384, 416, 448), "crop": 224, "test_size": 384}
dataloader = small_instances(
    "coco_2017_train", "coco_2017_val", batch_size=4, vertical_flip=True, **_sizes
)
optimizer, schedule = adamw(lr=1e-3), cosine(iterations=1500)
train = run_options(clip_norm=1.0, eval_period=0, max_dets=500, period_unit="iterations")
train["checkpoint_period"] = 500
