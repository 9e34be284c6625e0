"""Fit files of DINO and models to each other: conventions, scales and rows of classes."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..heads.dino import DINO
from ..heads.dino.dino_conventions import CONVENTIONS
from ..heads.dino.dino_model import COCO_IDS, COCO_ROWS
from .files import read_checkpoint
from .layouts.dino_names import DINOFile, find_layout, inspect_dino, is_ours
from .zoo import resolve_weights

RECIPES = "configs/COCO-Detection/dino_*"


def conventions_of_file(weights: str | Path) -> str | None:
    """Return the conventions of a whole DINO in a file, None for other files.

    Args:
        weights: path, URL or registered name.
    Raises: ValueError if it cannot be read.
    """
    tensors = read_checkpoint(resolve_weights(weights)).tensors
    layout = find_layout(tensors)
    if layout is not None:
        return layout
    file = inspect_dino(tensors)
    return None if file is None else file.conventions


def settle_dino(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Let a model follow the conventions of a file, or refuse a file of another DINO.

    Args:
        model: of any kind; others than DINO are left alone.
        tensors: of a whole DINO by the names of this package; others are left alone.
        origin: path of the file, for the message.
    Raises: ValueError if scales, rows of classes or conventions that the config asks for differ.
    """
    if not isinstance(model, DINO) or not is_ours(tensors):
        return
    file = inspect_dino(tensors)
    assert file is not None
    problem = _difference(file, model)
    if problem is not None:
        raise ValueError(f"{origin} does not fit, nothing was loaded: {problem}.")
    if file.conventions != model.conventions:
        model.use_conventions(file.conventions)


def _difference(file: DINOFile, model: DINO) -> str | None:
    """Return what differs and the config that would fit, None if the file fits."""
    levels = len(model.transformer.level_embed)
    if file.sizes.levels != levels:
        return (
            f"this is a DINO of {file.sizes.levels} scales, the config builds one of {levels}; use "
            f"{RECIPES}_{file.sizes.levels}scale_* or set model.scales={file.sizes.levels} with "
            "as many backbone features as the file's (MODEL.DINO.SCALES)"
        )
    rows = model.transformer.enc_out_class_embed.out_features
    if {file.rows, rows} == {len(COCO_IDS), COCO_ROWS}:
        return (
            f"its class layers have {file.rows} rows, {_meaning(file.rows)}, those of the config "
            f"{rows}, {_meaning(rows)}; set model.coco_ids={file.rows == COCO_ROWS} "
            "(MODEL.DINO.COCO_IDS)"
        )
    if file.conventions != model.conventions and not model.is_auto:
        own, wanted = CONVENTIONS[file.conventions], CONVENTIONS[model.conventions]
        return (
            f"it was trained with the conventions of {own.title} (positions of temperature "
            f"{own.temperature:g}), the config asks for those of {wanted.title} "
            f"({wanted.temperature:g}); set model.conventions={file.conventions} "
            "(MODEL.DINO.CONVENTIONS)"
        )
    return None


def _meaning(rows: int) -> str:
    return "COCO's ids 0..90" if rows == COCO_ROWS else f"COCO's {rows} classes"
