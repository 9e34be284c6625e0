"""FocalNet-B LRF, 300 epochs of ImageNet-1k: published top-1 83.9.

tools/train_net.py --num-gpus 8 --config-file <this file>
"""

from ..common.data.classes import imagenet
from ..common.models.classifier import classifier
from ..common.optim import adamw_matrices
from ..common.schedules import cosine_epochs
from ..common.train import run_options

model, dataloader = classifier("focalnet_base_lrf"), imagenet()
optimizer, schedule = adamw_matrices(lr=1e-3), cosine_epochs(300, warmup_iterations=20 * 1251)
train = run_options(clip_norm=5.0, recipe_batch=1024, eval_period=10, checkpoint_period=10)
