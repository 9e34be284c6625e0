"""Training augmentation policies, each a function that returns Detectron2 augmentations."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import transforms as T
from numpy.typing import NDArray

COCO_SIZES = tuple(range(480, 801, 32))


class RandomChoice(T.Augmentation):
    """Applies one of several augmentation lists, each with equal chance."""

    def __init__(self, choices: Sequence[Sequence[T.Augmentation]]) -> None:
        super().__init__()
        self.choices = [T.AugmentationList(list(choice)) for choice in choices]

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        return self.choices[np.random.randint(len(self.choices))](aug_input)


class PlainResizeTransform(T.ResizeTransform):
    """Bilinear without antialiasing, as mmdet resizes; Detectron2 averages where it shrinks."""

    def apply_image(self, img: NDArray[Any], interp: int | None = None) -> NDArray[Any]:
        """(H, W) or (H, W, C); only 8-bit images, and not labels, differ from Detectron2's."""
        if img.dtype != np.uint8 or interp is not None:
            return super().apply_image(img, interp)
        resized = cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return np.asarray(resized).reshape(self.new_h, self.new_w, *img.shape[2:])


def at_least_a_pixel(transform: T.Transform) -> T.Transform:
    """Let no side of a resize be 0, as that of a 1 x 20,000 image would."""
    if isinstance(transform, T.ResizeTransform):
        transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
    return transform


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, for images of any shape."""

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Draw the size."""
        return at_least_a_pixel(super().get_transform(image))


class ResizeScale(T.ResizeScale):
    """Detectron2's, for images of any shape."""

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Draw the size."""
        return at_least_a_pixel(super().get_transform(image))


class PlainResizeShortestEdge(ResizeShortestEdge):
    """The same with :class:`PlainResizeTransform`."""

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Draw the size."""
        chosen = super().get_transform(image)
        if not isinstance(chosen, T.ResizeTransform):
            return chosen
        return PlainResizeTransform(chosen.h, chosen.w, chosen.new_h, chosen.new_w)


class RandomCrop(T.RandomCrop):
    """Detectron2's, but nothing where it is the whole image: a crop clips each polygon, slowly."""

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Draws the place."""
        crop = super().get_transform(image)
        return T.NoOpTransform() if (crop.h, crop.w) == image.shape[:2] else crop


def shortest_edge(
    short_sides: Sequence[int] | int, max_long_side: int, antialias: bool
) -> T.ResizeShortestEdge:
    """Resizes the short side to one of some lengths, pixels; ``antialias=False`` as mmdet does."""
    kind = ResizeShortestEdge if antialias else PlainResizeShortestEdge
    sides = short_sides if isinstance(short_sides, int) else tuple(short_sides)
    return kind(sides, max_long_side, "choice")


def resize(
    *,
    short_sides: Sequence[int] = COCO_SIZES,
    max_long_side: int = 1333,
    flip: bool = True,
    antialias: bool = True,
) -> list[T.Augmentation]:
    """Horizontal flip, then the short side from a list, pixels, as in Detectron2's own recipes."""
    flips = [T.RandomFlip()] if flip else []
    return [*flips, shortest_edge(short_sides, max_long_side, antialias)]


def multiscale_or_crop(
    *,
    short_sides: Sequence[int] = COCO_SIZES,
    max_long_side: int = 1333,
    crop_short_sides: Sequence[int] = (400, 500, 600),
    crop_range: tuple[int, int] = (384, 600),
    antialias: bool = True,
) -> list[T.Augmentation]:
    """The policy of the published FocalNet and Swin detectors, which is that of DETR.

    Flip; then, with equal chance, either resize, or resize to a smaller size, crop, and resize.

    Args:
        short_sides: of the final resize, pixels.
        max_long_side: of both resizes, pixels.
        crop_short_sides: of the resize before the crop, pixels.
        crop_range: smallest and largest side of the crop, pixels.
        antialias: False resizes as mmdet does, where images shrink.
    Source: arXiv:2005.12872, appendix A.4;
    microsoft/FocalNet:detection/configs/focalnet (train_pipeline).
    """
    final = shortest_edge(short_sides, max_long_side, antialias)
    crop = [
        shortest_edge(crop_short_sides, max_long_side, antialias),
        RandomCrop("absolute_range", tuple(crop_range)),
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
    augmentations.append(ResizeShortestEdge(tuple(short_sides), max_long_side, "choice"))
    return [*augmentations, RandomCrop("absolute", (crop, crop))]


def large_scale_jitter(
    *,
    size: int = 1024,
    scale: tuple[float, float] = (0.1, 2.0),
    flip: bool = True,
    pad: bool = True,
) -> list[T.Augmentation]:
    """Flip, fit into a square times a random factor, then crop or pad to the square.

    Args:
        size: side of the square, pixels.
        scale: range of the factor.
        pad: pad here, which also gives label maps class 0 there; otherwise the model pads images.
    Source: arXiv:2012.07177, section 3; detectron2:model_zoo/configs/new_baselines.
    """
    low, high = scale
    jitter = ResizeScale(low, high, target_height=size, target_width=size)
    flips = [T.RandomFlip()] if flip else []
    return [*flips, jitter, T.FixedSizeCrop(crop_size=(size, size), pad=pad)]


# What `INPUT.POLICY` of a yaml config may name; each takes sizes from INPUT.MIN/MAX_SIZE_TRAIN.
AUGMENTATIONS: dict[str, Callable[..., list[Any]]] = {
    "resize": resize,
    "multiscale_or_crop": multiscale_or_crop,
}


def evaluation_resize(
    *, short_side: int = 800, max_long_side: int = 1333, antialias: bool = True
) -> list[T.Augmentation]:
    """The deterministic resize of evaluation, pixels; ``antialias=False`` as mmdet does."""
    return [shortest_edge(short_side, max_long_side, antialias)]


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
        result.append(type(augmentation)(short_side, round(augmentation.max_size * ratio)))
    return result
