"""Build augmentation policies as lists of Detectron2 augmentations."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import transforms as T
from numpy.typing import NDArray

COCO_SIZES = tuple(range(480, 801, 32))


class RandomChoice(T.Augmentation):
    """Apply one of several augmentation lists, chosen uniformly at random."""

    def __init__(self, choices: Sequence[Sequence[T.Augmentation]]) -> None:
        super().__init__()
        self.choices = [T.AugmentationList(list(choice)) for choice in choices]

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        """Transform an input in place, and return the transforms."""
        return self.choices[np.random.randint(len(self.choices))](aug_input)


class PlainResizeTransform(T.ResizeTransform):
    """Resize bilinearly without antialiasing, as mmdet does.

    Detectron2 resizes with Pillow, which averages over the source pixels when it downsamples.
    Source: open-mmlab/mmcv:mmcv/image/geometric.py (imresize, backend "cv2").
    """

    def apply_image(self, img: NDArray[Any], interp: int | None = None) -> NDArray[Any]:
        """Resize an image, (H, W) or (H, W, C).

        Only uint8 images without an explicit ``interp`` differ from Detectron2's resize, so label
        maps do not.
        """
        if img.dtype != np.uint8 or interp is not None:
            return super().apply_image(img, interp)
        resized = cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return np.asarray(resized).reshape(self.new_h, self.new_w, *img.shape[2:])


def clamp_to_one_pixel(transform: T.Transform) -> T.Transform:
    """Keep the sides of a resize at 1 pixel or more; a 1 x 20,000 image would round to 0."""
    if isinstance(transform, T.ResizeTransform):
        transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
    return transform


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Resize like Detectron2's class, but also images of extreme aspect ratios."""

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Sample the output size."""
        return clamp_to_one_pixel(super().get_transform(image))


class ResizeScale(T.ResizeScale):
    """Resize like Detectron2's class, but also images of extreme aspect ratios."""

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Sample the output size."""
        return clamp_to_one_pixel(super().get_transform(image))


class PlainResizeShortestEdge(ResizeShortestEdge):
    """Resize the shortest edge with :class:`PlainResizeTransform`."""

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Sample the output size."""
        resize = super().get_transform(image)
        if not isinstance(resize, T.ResizeTransform):
            return resize
        return PlainResizeTransform(resize.h, resize.w, resize.new_h, resize.new_w)


class RandomCrop(T.RandomCrop):
    """Crop like Detectron2's class, but skip crops that cover the whole image.

    Even such a crop would clip every polygon, which is slow.
    """

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Sample the crop window."""
        crop = super().get_transform(image)
        return T.NoOpTransform() if (crop.h, crop.w) == image.shape[:2] else crop


def shortest_edge(
    short_sides: Sequence[int] | int, max_long_side: int, antialias: bool
) -> T.ResizeShortestEdge:
    """Build the resize of the short side to one of several lengths.

    Args:
        short_sides: lengths to choose from, pixels.
        max_long_side: upper bound of the long side, pixels.
        antialias: False resizes as mmdet does.
    """
    resize_class = ResizeShortestEdge if antialias else PlainResizeShortestEdge
    sides = short_sides if isinstance(short_sides, int) else tuple(short_sides)
    return resize_class(sides, max_long_side, "choice")


def resize(
    *,
    short_sides: Sequence[int] = COCO_SIZES,
    max_long_side: int = 1333,
    flip: bool = True,
    antialias: bool = True,
) -> list[T.Augmentation]:
    """Flip horizontally, then resize the short side, as in Detectron2's recipes.

    Args:
        short_sides: lengths of the short side to choose from, pixels.
        max_long_side: upper bound of the long side, pixels.
        flip: mirror half of the images.
        antialias: False resizes as mmdet does.
    Source: facebookresearch/detectron2:configs/common/data/coco.py.
    """
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
    """Flip, then resize, or resize, crop and resize, as the published FocalNet detectors do.

    Each of the two branches is taken with probability 0.5. The policy is DETR's; Swin's detectors
    use it too.

    Args:
        short_sides: short sides of the final resize to choose from, pixels.
        max_long_side: upper bound of the long side in both resizes, pixels.
        crop_short_sides: short sides of the resize before the crop to choose from, pixels.
        crop_range: smallest and largest side of the crop, pixels.
        antialias: False resizes as mmdet does.
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
    """Flip, resize, then crop a square of fixed size: small inputs for small machines.

    A side that is shorter than the crop keeps its length.

    Args:
        short_sides: lengths of the short side to choose from, pixels.
        crop: side of the square, pixels.
        max_long_side: upper bound of the long side, pixels.
        vertical_flip: also flip half of the images upside down.
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
    """Flip, resize to a randomly scaled square, then crop or pad to the square.

    Args:
        size: side of the square, pixels.
        scale: range of the random scale factor.
        flip: mirror half of the images.
        pad: pad here, which also gives label maps class 0 there; otherwise the model pads images.
    Source: arXiv:2012.07177, section 3; detectron2:model_zoo/configs/new_baselines.
    """
    low, high = scale
    jitter = ResizeScale(low, high, target_height=size, target_width=size)
    flips = [T.RandomFlip()] if flip else []
    return [*flips, jitter, T.FixedSizeCrop(crop_size=(size, size), pad=pad)]


# Values of `INPUT.POLICY` in yaml configs; sizes come from INPUT.MIN/MAX_SIZE_TRAIN.
AUGMENTATIONS: dict[str, Callable[..., list[Any]]] = {
    "resize": resize,
    "multiscale_or_crop": multiscale_or_crop,
}


def evaluation_resize(
    *, short_side: int = 800, max_long_side: int = 1333, antialias: bool = True
) -> list[T.Augmentation]:
    """Resize the short side to a fixed length for evaluation.

    Args:
        short_side: target length, pixels.
        max_long_side: upper bound of the long side, pixels.
        antialias: False resizes as mmdet does.
    """
    return [shortest_edge(short_side, max_long_side, antialias)]


def scaled(augmentations: Sequence[T.Augmentation], ratio: float) -> list[T.Augmentation]:
    """Scale both sizes of the resize used in evaluation, for test-time augmentation.

    Args:
        augmentations: instances of ``ResizeShortestEdge``.
        ratio: factor on the short side and on the bound of the long side.
    Raises: ValueError for any other augmentation.
    """
    result = []
    for augmentation in augmentations:
        if not isinstance(augmentation, T.ResizeShortestEdge):
            raise ValueError(
                f"Test-time augmentation can only scale ResizeShortestEdge, got {augmentation}."
            )
        short_side = round(augmentation.short_edge_length[0] * ratio)
        result.append(type(augmentation)(short_side, round(augmentation.max_size * ratio)))
    return result
