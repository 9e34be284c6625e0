"""Use the backbones in a Detectron2 project of one's own, with Detectron2's trainer."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm

from ..atomic import replacing
from ..backbones import FocalNet
from ..backbones.build import backbone_class
from ..detectron2.backbone import is_c4
from ..detectron2.feature_shapes import C4_ADVICE
from ..experiment.options import own_yacs_options
from ..experiment.yacs_keys import add_focalnet_config
from ..heads.segmentors import PIXEL_MEAN, PIXEL_STD
from .ema import averaged_model

# Meta-architectures that read p3..p7.
DENSE = ("RetinaNet", "FCOS", "MmdetRetinaNet")
# Keys that a trainer follows if it overrides `build_optimizer`.
OPTIMIZER_KEYS = (
    *("SOLVER.OPTIMIZER", "SOLVER.NO_DECAY_NAMES", "SOLVER.BACKBONE_MULTIPLIER"),
    "SOLVER.LAYER_DECAY",
)
EMA_KEY = "SOLVER.EMA_DECAY"
# Further keys of ours that only the trainer of this package reads.
OTHER_KEYS = ("SOLVER.POLY_POWER", "SOLVER.EPOCHS", "SOLVER.EPOCH_STEPS", "INPUT.POLICY")


def use_focalnet(cfg: CfgNode, variant: str, weights: str | Path = "") -> CfgNode:
    """Turn the config of a Detectron2 model with FPN into one with a focal network.

    Sets the backbone and its features, images in RGB, ImageNet's pixel statistics, and the weights.
    Call it after reading the config of the project.

    Args:
        cfg: Detectron2's config; changed in place. Keys of this package are added if absent.
        variant: see :func:`focalnet_det.list_backbones`.
        weights: ``MODEL.WEIGHTS``: a file in Detectron2's names, as
            :func:`focalnet_det.checkpoint.convert_checkpoint` writes with ``to="detectron2"``.
    Returns: the config.
    Raises: KeyError for an unknown variant, ValueError for a config without FPN.
    """
    is_focalnet = backbone_class(variant) is FocalNet
    _refuse_c4(cfg)
    if "FOCALNET" not in cfg.MODEL:
        add_focalnet_config(cfg)
    kind = "focalnet" if is_focalnet else "focal_transformer"
    dense = cfg.MODEL.META_ARCHITECTURE in DENSE
    prefix = "build_retinanet" if dense else "build"
    cfg.MODEL.BACKBONE.NAME = f"{prefix}_{kind}_fpn_backbone"
    cfg.MODEL["FOCALNET" if is_focalnet else "FOCAL_TRANSFORMER"].VARIANT = variant
    cfg.MODEL.FPN.IN_FEATURES = [f"stage{k}" for k in range(2 if dense else 1, 5)]
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(PIXEL_MEAN), list(PIXEL_STD)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.WEIGHTS = str(weights)
    return cfg


def _refuse_c4(cfg: CfgNode) -> None:
    if is_c4(cfg):
        raise ValueError(f"MODEL.ROI_HEADS.NAME is Res5ROIHeads. {C4_ADVICE}")


class OwnProjectHook(HookBase):
    """Do what Detectron2's trainer leaves out, and refuse what it would silently ignore.

    ``SOLVER.EMA_DECAY`` is followed: the averaged weights are written as ``model_ema.pth`` at the
    end. Other keys of this package that ``DefaultTrainer`` does not read are errors before the
    first iteration. Register it with ``trainer.register_hooks([OwnProjectHook(cfg)])``.

    Args:
        cfg: of the project.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.averaged: Any = None

    def before_train(self) -> None:
        """Check the config, and begin the average.

        Raises: ValueError that names the keys which the trainer does not read.
        """
        builder = self.trainer.build_optimizer.__func__
        own_optimizer = builder is not DefaultTrainer.build_optimizer.__func__
        if keys := ignored_keys(self.cfg, own_optimizer=own_optimizer):
            raise ValueError(
                f"Detectron2's trainer does not read {', '.join(keys)}: leave them at their "
                "defaults, or train with focalnet-det train. (Keys of the optimizer are read if "
                "build_optimizer of your trainer calls that of "
                "focalnet_det.experiment.yacs_parts.)"
            )
        if decay := _value(self.cfg, EMA_KEY):
            self.averaged = averaged_model(self._model(), decay)

    def after_step(self) -> None:
        """Update the average."""
        if self.averaged is not None:
            self.averaged.update_parameters(self._model())

    def after_train(self) -> None:
        """Write the averaged weights."""
        if self.averaged is None or not comm.is_main_process():
            return
        with replacing(Path(self.cfg.OUTPUT_DIR) / "model_ema.pth") as temporary:
            torch.save({"model": self.averaged.module.state_dict()}, temporary)

    def _model(self) -> torch.nn.Module:
        # The trainer itself names its model in one version of Detectron2 alone.
        model: torch.nn.Module = self.trainer._trainer.model
        return getattr(model, "module", model)


def ignored_keys(cfg: CfgNode, *, own_optimizer: bool = False) -> list[str]:
    """Return the keys that were changed, and that Detectron2's trainer does not read.

    Args:
        cfg: with the keys of this package.
        own_optimizer: whether the trainer builds its optimizer from them.
    """
    defaults = get_cfg()
    add_focalnet_config(defaults)
    keys = [key for key in own_yacs_options() if key != EMA_KEY] + list(OTHER_KEYS)
    if not own_optimizer:
        keys += OPTIMIZER_KEYS
    found = [key for key in keys if _value(cfg, key) != _value(defaults, key)]
    if cfg.MODEL.CONVENTIONS != "detectron2" and "Mmdet" not in cfg.MODEL.META_ARCHITECTURE:
        found.append("MODEL.CONVENTIONS")
    # FROZEN_STAGES of the backbone's own node is what freezes it.
    if cfg.MODEL.BACKBONE.FREEZE_AT not in (0, defaults.MODEL.BACKBONE.FREEZE_AT):
        found.append("MODEL.BACKBONE.FREEZE_AT")
    return found


def _value(cfg: CfgNode, key: str) -> Any:
    section, name = key.split(".")
    return cfg[section][name]
