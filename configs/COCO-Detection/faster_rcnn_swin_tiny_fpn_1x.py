"""Faster R-CNN, Swin-T, FPN, 1x. No number is published for this recipe.

tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_instances
from ..common.models.mask_rcnn import faster_rcnn
from ..common.optim import NO_DECAY_SWIN, adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = faster_rcnn("swin_tiny", drop_path_rate=0.1)
dataloader, schedule = coco_instances(masks=False), multistep("1x")
optimizer = adamw(lr=1e-4, weight_decay=0.05, no_decay_names=NO_DECAY_SWIN)
train = run_options(precision="fp16", recipe_batch=16)
