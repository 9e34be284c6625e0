"""One's own folders of images and label maps: points a config with a semantic head at them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from omegaconf import DictConfig

from ..data.labels import IGNORE, balanced_weights, pixel_counts
from ..data.semantic import ClassList, paired_files, read_class_list, register_sem_seg
from .own_data import set_num_classes, use_data_sets

logger = logging.getLogger("focalnet_det")

# With few images, a class of thin or rare objects would not be learned at all.
FEW_IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class FolderPairs:
    """Image folders, and the label folder of each."""

    images: Sequence[str] = ()
    labels: Sequence[str] = ()

    def register(self, split: str, classes: ClassList) -> tuple[list[str], int]:
        """Registers each pair under the name of the label folder and of the split.

        Returns: the registered names, and the number of images.
        Raises: ValueError if a folder is missing, or a pair has no file in common.
        """
        names: list[str] = []
        count = 0
        for images, labels in zip(self.images, self.labels, strict=True):
            name = f"{Path(labels).resolve().name}_{split}"
            if name in names:
                name += f"_{len(names) + 1}"
            count += len(paired_files(images, labels))
            register_sem_seg(name, images, labels, classes)
            names.append(name)
        return names, count


def folder_pairs(prefix: str, images: Sequence[str], labels: Sequence[str]) -> FolderPairs:
    """Pairs the values of two options of the command line.

    Raises: ValueError if there are not as many of one as of the other.
    """
    if len(images) != len(labels):
        raise ValueError(
            f"Each --{prefix}-images DIR needs --{prefix}-labels DIR: {len(images)} image folders, "
            f"{len(labels)} label folders."
        )
    return FolderPairs(images=images, labels=labels)


def use_label_folders(
    cfg: CfgNode | DictConfig,
    *,
    train: FolderPairs,
    val: FolderPairs,
    classes: str | None,
    first_label: int | None,
    overrides: Sequence[str],
) -> None:
    """Points a config at folders; the class count comes from the class list.

    Length, batch and, with the batch, learning rate are fitted to the data, unless the overrides
    set a length. Up to 1,000 images, UPerNet's loss weights the classes by their pixels, unless
    the config or the overrides give weights.

    Args:
        train, val: what to train and to evaluate on; without training folders (to evaluate), the
            validation folders stand for them.
        classes: file of class names, see ``read_class_list``.
        first_label: value of the first class, where the file does not say it.
        overrides: those that the config has been given.
    Raises: ValueError if a folder or the class list is not as it should be.
    """
    if classes is None:
        raise ValueError("Label folders need --classes FILE: a class name a line, in order.")
    found = read_class_list(classes, first_label)
    train_names, num_images = (train if train.images else val).register("train", found)
    val_names, _ = val.register("val", found)
    if isinstance(cfg, CfgNode):
        head = cfg.MODEL.SEM_SEG_HEAD
        head.NUM_CLASSES, head.IGNORE_VALUE = len(found.names), IGNORE
    else:
        set_num_classes(cfg.model, len(found.names))
        chosen = any(key.startswith("model.loss.class_weights") for key in overrides)
        if train.images and num_images <= FEW_IMAGES and not chosen:
            balance_classes(cfg, train, found)
    use_data_sets(cfg, train=train_names, val=val_names, num_images=num_images, overrides=overrides)


def balance_classes(cfg: DictConfig, train: FolderPairs, classes: ClassList) -> None:
    """Gives a model whose loss has ``class_weights``, and none yet, those of its training labels.

    Raises: ValueError if a label file holds values of no class.
    """
    loss = cfg.model.get("loss")
    if loss is None or "class_weights" not in loss or loss.class_weights is not None:
        return
    files = (
        label
        for images, labels in zip(train.images, train.labels, strict=True)
        for _, label in paired_files(images, labels)
    )
    weights = balanced_weights(pixel_counts(files, classes.rule))
    loss.class_weights = weights
    low, high = min(weights), max(weights)
    logger.info(
        "Few images: the loss weights the classes by their pixels, from %g (%s) to %g (%s). For "
        "equal weights: model.loss.class_weights=null.",
        low,
        classes.names[weights.index(low)],
        high,
        classes.names[weights.index(high)],
    )
