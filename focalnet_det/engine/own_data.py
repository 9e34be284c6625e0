"""One's own data: points a config at it, and fits the length of training to it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data.datasets import register_coco_json

logger = logging.getLogger("focalnet_det")

# From random or ImageNet weights, a small data set wants to be seen often, a large one need not be.
EPOCHS = 60
FEWEST_ITERATIONS = 1000
MOST_ITERATIONS = 90_000
FEWEST_EPOCHS = 12


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Batch and length of a training, and the reason in words."""

    batch_size: int
    iterations: int
    reason: str


def plan(num_images: int, batch_size: int) -> Plan:
    """Batch and length for a data set of some size.

    The batch is at most the data set. 60 epochs, but at least 1,000 iterations; and at most
    90,000, unless these are fewer than 12 epochs.

    Args:
        num_images: with annotations, in the training set.
        batch_size: of the config.
    """
    batch = min(batch_size, max(1, num_images))
    per_epoch = max(1, math.ceil(num_images / batch))
    most = max(MOST_ITERATIONS, FEWEST_EPOCHS * per_epoch)
    iterations = min(max(EPOCHS * per_epoch, FEWEST_ITERATIONS), most)
    reason = (
        f"{num_images} training images in batches of {batch}: {iterations} iterations, "
        f"{iterations / per_epoch:.0f} passes over the data"
    )
    if batch < batch_size:
        reason += f"; the config's batch of {batch_size} is larger than the data set"
    return Plan(batch_size=batch, iterations=iterations, reason=reason)


@dataclass(frozen=True, kw_only=True)
class CocoFiles:
    """Annotation files in COCO format, and the folder of each one's images."""

    annotations: Sequence[str] = ()
    images: Sequence[str] = ()

    def register(self, split: str) -> tuple[list[str], list[str]]:
        """Registers each file under its stem and the name of the split.

        Returns: the registered names, and the class names.
        Raises: ValueError if a file is not as it should be or has other classes than the first.
        """
        names: list[str] = []
        classes: list[str] = []
        for annotations, images in zip(self.annotations, self.images, strict=True):
            name = f"{Path(annotations).stem}_{split}"
            if name in names:
                name += f"_{len(names) + 1}"
            found = register_coco_json(name, annotations, images)
            check_same_classes(found, classes or found, annotations, self.annotations[0])
            names.append(name)
            classes = found
        return names, classes


def coco_files(
    option: str, annotations: Sequence[str], images: Sequence[str], default_images: Sequence[str]
) -> CocoFiles:
    """Pairs the values of two options of the command line.

    Raises: ValueError if there are not as many folders as files.
    """
    images = images or (default_images if annotations else ())
    if len(annotations) != len(images):
        raise ValueError(
            f"Each --{option} FILE needs --images DIR: "
            f"{len(annotations)} files, {len(images)} folders."
        )
    return CocoFiles(annotations=annotations, images=images)


def check_same_classes(
    classes: Sequence[str], expected: Sequence[str], file: str, expected_file: str
) -> None:
    """Raises: ValueError if the classes of two files are not the same, in the same order."""
    if list(classes) != list(expected):
        raise ValueError(
            f"{file} has other categories than {expected_file}: "
            f"{sorted(set(classes) ^ set(expected)) or 'another order'}."
        )


def use_coco_json(
    cfg: CfgNode | DictConfig, *, train: CocoFiles, val: CocoFiles, overrides: list[str]
) -> None:
    """Points a config at COCO-format files; the class count comes from the training files.

    Length, batch and, with the batch, learning rate are fitted to the data, unless the overrides
    set a length.

    Args:
        train, val: what to train and to evaluate on; without training files (to evaluate), the
            validation files stand for them.
        overrides: those that the config has been given.
    Raises: ValueError if a file is not as it should be, or the validation files have other
        classes than the training files.
    """
    train = train if train.annotations else val
    train_names, classes = train.register("train")
    val_names, val_classes = val.register("val")
    if val_names:
        check_same_classes(val_classes, classes, val.annotations[0], train.annotations[0])
    points = len(MetadataCatalog.get(train_names[0]).get("keypoint_names") or ())
    num_images = sum(MetadataCatalog.get(name).num_annotated_images for name in train_names)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = points or 17
    else:
        set_num_classes(cfg.model, len(classes))
        set_everywhere(cfg.model, "num_keypoints", points or 17)
    use_data_sets(cfg, train=train_names, val=val_names, num_images=num_images, overrides=overrides)


def use_data_sets(
    cfg: CfgNode | DictConfig,
    *,
    train: Sequence[str],
    val: Sequence[str],
    num_images: int,
    overrides: Sequence[str],
) -> None:
    """Puts registered data sets into a config, and fits length, batch and rate to them.

    Args:
        num_images: with annotations, in the training sets.
        overrides: those that the config has been given; a length among them stays.
    """
    if isinstance(cfg, CfgNode):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(val)
        if not any(key.startswith(("SOLVER.EPOCHS", "SOLVER.MAX_ITER")) for key in overrides):
            fit_yacs(cfg.SOLVER, num_images)
        return
    cfg.dataloader.train.datasets = list(train)
    # Every set is evaluated as the config's first one would be.
    loaders = cfg.dataloader.test[:1]
    cfg.dataloader.test = [{**loader, "dataset": name} for loader in loaders for name in val]
    if not any(key.startswith(("schedule.iterations", "schedule.epochs")) for key in overrides):
        fit_lazy(cfg, num_images)


def fit_lazy(cfg: DictConfig, num_images: int) -> None:
    """Sets batch, rate and schedule of a LazyConfig by :func:`plan`, and says why."""
    loader, schedule = cfg.dataloader.train, cfg.schedule
    found = plan(num_images, loader.batch_size)
    cfg.optimizer.lr *= found.batch_size / loader.batch_size
    if cfg.train.get("recipe_batch") == loader.batch_size:
        cfg.train.recipe_batch = found.batch_size
    loader.batch_size = found.batch_size
    if schedule.get("milestones"):
        length = schedule.epochs or schedule.iterations
        schedule.milestones = [round(m / length * found.iterations) for m in schedule.milestones]
    schedule.epochs, schedule.iterations = None, found.iterations
    schedule.warmup_iterations = min(schedule.warmup_iterations, found.iterations // 10)
    say(found, cfg.optimizer.lr, "schedule.iterations=N")


def fit_yacs(solver: CfgNode, num_images: int) -> None:
    """Sets batch, rate and schedule of a yacs config by :func:`plan`, and says why."""
    found = plan(num_images, solver.IMS_PER_BATCH)
    solver.BASE_LR *= found.batch_size / solver.IMS_PER_BATCH
    if solver.RECIPE_BATCH == solver.IMS_PER_BATCH:
        solver.RECIPE_BATCH = found.batch_size
    solver.IMS_PER_BATCH = found.batch_size
    length, steps = (
        (solver.EPOCHS, solver.EPOCH_STEPS) if solver.EPOCHS else (solver.MAX_ITER, solver.STEPS)
    )
    solver.STEPS = tuple(round(step / length * found.iterations) for step in steps)
    solver.EPOCHS, solver.MAX_ITER = 0, found.iterations
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, found.iterations // 10)
    say(found, solver.BASE_LR, "SOLVER.EPOCHS 0 SOLVER.MAX_ITER N")


def say(found: Plan, lr: float, override: str) -> None:
    """Prints a plan, and how to have it otherwise."""
    logger.info("%s; learning rate %g. For another length: %s.", found.reason, lr, override)


def set_num_classes(node: Any, count: int) -> None:
    """:func:`set_everywhere` for ``num_classes``."""
    set_everywhere(node, "num_classes", count)


def set_everywhere(node: Any, name: str, value: int) -> None:
    """Sets every field of that name in a LazyConfig model that is not a reference to another."""
    if isinstance(node, DictConfig):
        for key in node:
            if key == name:
                if not OmegaConf.is_interpolation(node, key):
                    node[key] = value
            else:
                set_everywhere(node[key], name, value)
    elif isinstance(node, ListConfig):
        for item in node:
            set_everywhere(item, name, value)
