"""One's own COCO panoptic files: points a config with a panoptic model at them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig

from ..data.labels import IGNORE
from ..data.panoptic_sets import PanopticClasses, PanopticFiles, register_panoptic_json
from .own_data import check_same_classes, use_data_sets


@dataclass(frozen=True, kw_only=True)
class PanopticSets:
    """Panoptic JSONs, and for each the folder of its PNGs and that of its images."""

    jsons: Sequence[str] = ()
    roots: Sequence[str] = ()
    images: Sequence[str] = ()

    def register(self, split: str) -> tuple[list[str], list[PanopticClasses]]:
        """Registers each set under the stem of its JSON and the name of the split.

        Returns: the registered names, and their classes.
        Raises: ValueError if a file is not as it should be or has other classes than the first.
        """
        names: list[str] = []
        found: list[PanopticClasses] = []
        for path, root, images in zip(self.jsons, self.roots, self.images, strict=True):
            name = f"{Path(path).stem}_{split}"
            if name in names:
                name += f"_{len(names) + 1}"
            files = PanopticFiles(panoptic_json=path, panoptic_root=root, images=images)
            found.append(register_panoptic_json(name, files))
            same_classes(found[-1], path, found[0], self.jsons[0])
            names.append(name)
        return names, found


def same_classes(classes: PanopticClasses, path: str, first: PanopticClasses, other: str) -> None:
    """Raises: ValueError if two files do not have the same things and stuff, in the same order."""
    check_same_classes(classes.thing_classes, first.thing_classes, path, other)
    check_same_classes(classes.stuff_classes, first.stuff_classes, path, other)


def panoptic_sets(
    prefix: str, jsons: Sequence[str], roots: Sequence[str], images: Sequence[str]
) -> PanopticSets:
    """Joins the values of three options of the command line.

    Args:
        roots: may be empty: then the folder beside each JSON, or beside its folder, that has the
            JSON's name without suffix, as in COCO.
    Raises: ValueError if there are not as many of one as of the other, or no such folder.
    """
    roots = roots or [default_root(path) for path in jsons]
    if not len(jsons) == len(roots) == len(images):
        raise ValueError(
            f"Each --{prefix}panoptic-json FILE needs --{prefix}panoptic-root DIR and "
            f"--{prefix}images DIR: {len(jsons)} files, {len(roots)} PNG folders, {len(images)} "
            "image folders."
        )
    return PanopticSets(jsons=jsons, roots=roots, images=images)


def default_root(panoptic_json: str) -> str:
    """Folder of the PNGs of a JSON, as COCO's archives have it.

    Raises: ValueError if there is none.
    """
    path = Path(panoptic_json)
    for parent in (path.parent, path.parent.parent):
        if (parent / path.stem).is_dir():
            return str(parent / path.stem)
    raise ValueError(f"No folder {path.stem} beside {path} or its folder: name the PNG folder.")


def use_panoptic_sets(
    cfg: CfgNode | DictConfig,
    *,
    train: PanopticSets,
    val: PanopticSets,
    overrides: Sequence[str],
) -> None:
    """Points a config at panoptic files; things and stuff come from them.

    Length, batch and, with the batch, learning rate are fitted to the data, unless the overrides
    set a length.

    Args:
        train, val: what to train and to evaluate on; without training files (to evaluate), the
            validation files stand for them.
        overrides: those that the config has been given.
    Raises: ValueError if a file is not as it should be, the validation files have other classes,
        or the config is not of a panoptic model.
    """
    train = train if train.jsons else val
    train_names, found = train.register("train")
    val_names, val_found = val.register("val")
    if val_found:
        same_classes(val_found[0], val.jsons[0], found[0], train.jsons[0])
    num_images = sum(MetadataCatalog.get(name).num_annotated_images for name in train_names)
    set_class_counts(cfg, things=len(found[0].thing_classes), stuff=len(found[0].stuff_classes))
    use_data_sets(cfg, train=train_names, val=val_names, num_images=num_images, overrides=overrides)


def set_class_counts(cfg: CfgNode | DictConfig, *, things: int, stuff: int) -> None:
    """Sets the class counts of both heads of a panoptic FPN.

    Args:
        stuff: with the class that stands for all things.
    Raises: ValueError if the model has no semantic head, or no box head.
    """
    if isinstance(cfg, CfgNode):
        if cfg.MODEL.META_ARCHITECTURE != "PanopticFPN":
            raise ValueError(
                f"Panoptic files need a panoptic model, not {cfg.MODEL.META_ARCHITECTURE}."
            )
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = things
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = stuff, IGNORE
        return
    if not {"roi_heads", "sem_seg_head"} <= set(cfg.model):
        raise ValueError("Panoptic files need a panoptic model: see configs/*PanopticSegmentation.")
    cfg.model.roi_heads.num_classes, cfg.model.sem_seg_head.num_classes = things, stuff
