"""Masked image modeling, FocalNet-B LRF: SimMIM's recipe for Swin-B; FocalNet has none of its own.

tools/train_net.py --num-gpus 16 --config-file <this file>
"""

from ..common.data.classes import without_labels
from ..common.models.classifier import masked_images
from ..common.optim import adamw_matrices
from ..common.schedules import cosine_epochs
from ..common.train import run_options

model = masked_images("focalnet_base_lrf")
dataloader = without_labels("imagenet_unlabeled_train", "imagenet_unlabeled_val")
optimizer = adamw_matrices(lr=8e-4)
schedule = cosine_epochs(100, warmup_iterations=10 * 625, warmup_factor=5e-3, final_factor=5e-2)
train = run_options(clip_norm=5.0, recipe_batch=2048, eval_period=0, checkpoint_period=5)
