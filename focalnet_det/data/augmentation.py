"""Training augmentation policies, each a function that returns Detectron2 augmentations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from detectron2.data import transforms as T

COCO_SIZES = tuple(range(480, 801, 32))


class RandomChoice(T.Augmentation):
    """Applies one of several augmentation lists, each with equal chance."""

    def __init__(self, choices: Sequence[Sequence[T.Augmentation]]) -> None:
        super().__init__()
        self.choices = [T.AugmentationList(list(choice)) for choice in choices]

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        return self.choices[np.random.randint(len(self.choices))](aug_input)


def resize(
    *,
    short_sides: Sequence[int] = COCO_SIZES,
    max_long_side: int = 1333,
    flip: bool = True,
) -> list[T.Augmentation]:
    """Horizontal flip, then the short side from a list, pixels, as in Detectron2's own recipes."""
    flips = [T.RandomFlip()] if flip else []
    return [*flips, T.ResizeShortestEdge(tuple(short_sides), max_long_side, "choice")]


def multiscale_or_crop(
    *,
    short_sides: Sequence[int] = COCO_SIZES,
    max_long_side: int = 1333,
    crop_short_sides: Sequence[int] = (400, 500, 600),
    crop_range: tuple[int, int] = (384, 600),
) -> list[T.Augmentation]:
    """The policy of the published FocalNet and Swin detectors, which is that of DETR.

    Flip; then, with equal chance, either resize, or resize to a smaller size, crop, and resize.

    Args:
        short_sides: of the final resize, pixels.
        max_long_side: of both resizes, pixels.
        crop_short_sides: of the resize before the crop, pixels.
        crop_range: smallest and largest side of the crop, pixels.
    Source: arXiv:2005.12872, appendix A.4;
    microsoft/FocalNet:detection/configs/focalnet (train_pipeline).
    """
    final = T.ResizeShortestEdge(tuple(short_sides), max_long_side, "choice")
    crop = [
        T.ResizeShortestEdge(tuple(crop_short_sides), max_long_side, "choice"),
        T.RandomCrop("absolute_range", tuple(crop_range)),
        final,
    ]
    return [T.RandomFlip(), RandomChoice([[final], crop])]


def resize_and_crop(
    *,
    short_sides: Sequence[int],
    crop: int,
    max_long_side: int = 1333,
    vertical_flip: bool = False,
) -> list[T.Augmentation]:
    """Flip, resize, then a square crop of fixed size, pixels: small inputs for small machines.

    An image smaller than the crop in one direction keeps its size in that direction.
    """
    augmentations: list[T.Augmentation] = [T.RandomFlip()]
    if vertical_flip:
        augmentations.append(T.RandomFlip(horizontal=False, vertical=True))
    augmentations.append(T.ResizeShortestEdge(tuple(short_sides), max_long_side, "choice"))
    return [*augmentations, T.RandomCrop("absolute", (crop, crop))]


# What `INPUT.POLICY` of a yaml config may name; each takes sizes from INPUT.MIN/MAX_SIZE_TRAIN.
POLICIES: dict[str, Callable[..., list[Any]]] = {
    "resize": resize,
    "multiscale_or_crop": multiscale_or_crop,
}


def evaluation_resize(*, short_side: int = 800, max_long_side: int = 1333) -> list[T.Augmentation]:
    """The deterministic resize of evaluation, pixels."""
    return [T.ResizeShortestEdge(short_side, max_long_side)]


def scaled(augmentations: Sequence[T.Augmentation], ratio: float) -> list[T.Augmentation]:
    """The deterministic resize of evaluation, with both of its sizes multiplied.

    Raises: ValueError for any other augmentation.
    """
    result = []
    for augmentation in augmentations:
        if not isinstance(augmentation, T.ResizeShortestEdge):
            raise ValueError(
                f"Test-time augmentation scales ResizeShortestEdge, not {augmentation}."
            )
        short_side = round(augmentation.short_edge_length[0] * ratio)
        result.append(T.ResizeShortestEdge(short_side, round(augmentation.max_size * ratio)))
    return result
