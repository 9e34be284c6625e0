"""Sparse R-CNN, 300 proposals, Focal-T, FPN, 3x: published box AP 49.0 on COCO val.

The scores are published, the configs are not: recipe ours, that of the same authors' FocalNet.
tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_instances
from ..common.models.sparse_rcnn import sparse_rcnn
from ..common.optim import adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = sparse_rcnn("focal_tiny")
dataloader, schedule = coco_instances(masks=False), multistep("3x")
optimizer = adamw(lr=2.5e-5, weight_decay=1e-4, no_decay_names=())
train = run_options(recipe_batch=16, clip_norm=1.0)
