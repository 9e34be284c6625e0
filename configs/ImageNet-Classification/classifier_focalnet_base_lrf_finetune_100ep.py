"""FocalNet-B LRF, fine-tuned after masked image modeling; SimMIM's recipe for Swin-B, no score.

tools/train_net.py --num-gpus 16 --config-file <this file> train.init_checkpoint=<pretrained>
"""

from ..common.data.classes import imagenet
from ..common.models.classifier import classifier
from ..common.optim import adamw_matrices
from ..common.schedules import cosine_epochs
from ..common.train import run_options

model, dataloader = classifier("focalnet_base_lrf", drop_path_rate=0.1), imagenet(batch_size=2048)
optimizer = adamw_matrices(lr=5e-3, layer_decay=0.9)
schedule = cosine_epochs(100, warmup_iterations=20 * 625, warmup_factor=2e-4, final_factor=2e-4)
train = run_options(clip_norm=5.0, recipe_batch=2048, eval_period=5, checkpoint_period=5)
