"""Mask R-CNN, FocalNet-T LRF, FPN, 100 epochs of large-scale jitter. No number is published.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
Simple copy-paste: dataloader.train.copy_paste=0.5
"""

from ..common.data.coco import coco_lsj
from ..common.models.mask_rcnn import mask_rcnn
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = mask_rcnn("focalnet_tiny_lrf", focal_windows=(9, 9, 9, 9), drop_path_rate=0.3)
dataloader, schedule = coco_lsj(batch_size=64), multistep("100ep")
optimizer = adamw(lr=2e-4, weight_decay=0.05)
train = run_options(precision="fp16", recipe_batch=64)
