"""RepPoints v2, Swin-T, BiFPN, 3x: published box AP 50.0 on COCO val.

As in SwinTransformer/Swin-Transformer-Object-Detection, the only public recipe.
tools/train_net.py --num-gpus 8 --config-file <this file> train.init_checkpoint=<ImageNet weights>
"""

from ..common.data.coco import coco_multiscale
from ..common.models.reppoints_v2 import reppoints_v2
from ..common.optim import NO_DECAY_SWIN, adamw
from ..common.schedules import multistep
from ..common.train import run_options

model = reppoints_v2("swin_tiny", drop_path_rate=0.2)
dataloader = coco_multiscale(short_sides=tuple(range(480, 961, 32)), masks=False)
optimizer = adamw(lr=1e-4, weight_decay=0.05, no_decay_names=NO_DECAY_SWIN)
schedule = multistep("3x")
train = run_options(precision="fp16", recipe_batch=16)
