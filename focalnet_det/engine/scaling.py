"""The linear rule: a learning rate follows the batch."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from omegaconf import DictConfig

logger = logging.getLogger("focalnet_det")


def scale_learning_rate(cfg: CfgNode | DictConfig, overrides: Sequence[str]) -> float:
    """Multiplies the rate of a config by its batch over the one its rate was chosen for, says so.

    Not if the rate is among the overrides: who sets it means it. The recipe's batch becomes that of
    the config, so that a config that was saved is not scaled again.

    Returns: the factor.
    Source: arXiv:1706.02677, section 2.1.
    """
    yacs = isinstance(cfg, CfgNode)
    recipe = cfg.SOLVER.RECIPE_BATCH if yacs else cfg.train.get("recipe_batch", 0)
    batch = cfg.SOLVER.IMS_PER_BATCH if yacs else cfg.dataloader.train.batch_size
    key = "SOLVER.BASE_LR" if yacs else "optimizer.lr"
    given = any(item.partition("=")[0] == key for item in overrides)
    if recipe in (0, batch) or given:
        return 1.0
    factor = batch / recipe
    if yacs:
        cfg.SOLVER.BASE_LR *= factor
        cfg.SOLVER.RECIPE_BATCH = batch
        rate = cfg.SOLVER.BASE_LR
    else:
        cfg.optimizer.lr *= factor
        cfg.train.recipe_batch = batch
        rate = cfg.optimizer.lr
    logger.info(
        "Batch %d instead of the recipe's %d: learning rate times %g, %g. To set it: %s.",
        batch,
        recipe,
        factor,
        rate,
        f"{key} VALUE" if yacs else f"{key}=VALUE",
    )
    return float(factor)
