"""Train a model of Detectron2's own zoo on a FocalNet, with Detectron2's trainer.

python examples/detectron2_project.py DATASET OUTPUT [KEY VALUE ...]
"""

import sys

from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer

from focalnet_det import add_focalnet_config
from focalnet_det.checkpoint import convert_checkpoint
from focalnet_det.engine.own_project import OwnProjectHook, use_focalnet
from focalnet_det.experiment.yacs_parts import build_optimizer


class Trainer(DefaultTrainer):
    """Detectron2's trainer with AdamW, which focal networks are trained with."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Build the optimizer that ``SOLVER.OPTIMIZER`` names."""
        return build_optimizer(cfg, model)


def configure(dataset, output, overrides=(), weights=None):
    """Return the config: any one of the zoo that has an FPN, with another backbone."""
    cfg = get_cfg()
    add_focalnet_config(cfg)
    # Not at the top: on current setuptools, the zoo of Detectron2's main needs our package first.
    from detectron2.model_zoo import get_config_file

    cfg.merge_from_file(get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    if weights:  # any public file; its names become those of Detectron2
        convert_checkpoint(weights, f"{output}/backbone.pth", "detectron2")
    use_focalnet(cfg, "focalnet_tiny_lrf", f"{output}/backbone.pth" if weights else "")
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = "ADAMW", 1e-4, 0.05
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (dataset,), ()
    cfg.OUTPUT_DIR = output
    cfg.merge_from_list(list(overrides))
    return cfg


def train(cfg):
    """Train, and return the trainer."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([OwnProjectHook(cfg)])
    trainer.train()
    return trainer


if __name__ == "__main__":
    train(configure(*sys.argv[1:3], sys.argv[3:]))
