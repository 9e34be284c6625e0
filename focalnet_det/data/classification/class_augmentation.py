"""Augment images for classification and masked image modeling, with timm and torchvision."""

from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.data import transforms as T
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import Compose

from ...compat import require_timm

BICUBIC = Image.Resampling.BICUBIC
Picture = Callable[[Image.Image], Image.Image]


class PictureTransform(T.Transform):
    """A change of the whole image; it has no coordinates, so it suits image labels only."""

    def __init__(self, change: Picture) -> None:
        super().__init__()
        self.change = change

    def apply_image(self, img: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Change a uint8 RGB image, (H, W, 3)."""
        return np.asarray(self.change(Image.fromarray(img)))

    def apply_coords(self, coords: NDArray[Any]) -> NDArray[Any]:
        """Raise NotImplementedError: boxes and masks cannot follow."""
        raise NotImplementedError("This augmentation is for image labels: it moves no boxes.")


class PictureAugmentation(T.Augmentation):
    """A random change of a PIL image, with the random numbers of Python, NumPy and PyTorch."""

    def __init__(self, change: Picture) -> None:
        super().__init__()
        self.change = change

    def get_transform(self, image: NDArray[np.uint8]) -> T.Transform:  # noqa: ARG002
        """Return the change; it draws its numbers when it is applied."""
        return PictureTransform(self.change)


def class_augmentation(
    *,
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
    color_jitter: float = 0.4,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
) -> list[T.Augmentation]:
    """Crop, flip and change colors at random, with timm's transforms.

    Args:
        size: side of the square, pixels.
        scale: range of the crop's area, as a share of the image.
        ratio: range of the crop's width divided by its height.
        flip_probability: of mirroring the image.
        color_jitter: factor of brightness, contrast and saturation; as in timm, only without
            ``auto_augment``.
        auto_augment: name of a policy of timm, "" for none.
    Raises: ImportError without timm.
    Source: microsoft/FocalNet:data/build.py (build_transform) and config.py (AUG).
    """
    transforms = require_timm("data").create_transform(
        input_size=size,
        is_training=True,
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=flip_probability,
        color_jitter=color_jitter or None,
        auto_augment=auto_augment or None,
        interpolation="bicubic",
        normalize=False,
    )
    # The last one makes a tensor of the picture, which the mapper does itself.
    return [PictureAugmentation(Compose(transforms.transforms[:-1]))]


class BicubicResize(T.Augmentation):
    """Resize the short side, bicubic with antialiasing; the long side is rounded down.

    Source: pytorch/vision:torchvision/transforms/functional.py (resize).
    """

    def __init__(self, short_side: int) -> None:
        super().__init__()
        self.short_side = short_side

    def get_transform(self, image: NDArray[np.uint8]) -> T.Transform:
        """Return the resize of an image, (H, W, C)."""
        height, width = image.shape[:2]
        shorter = min(height, width)
        sides = [self.short_side * side // shorter for side in (height, width)]
        return T.ResizeTransform(height, width, *sides, BICUBIC)


class CenterCrop(T.Augmentation):
    """Crop a square at the center of an image that is at least as large, pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get_transform(self, image: NDArray[np.uint8]) -> T.Transform:
        """Return the crop of an image, (H, W, C)."""
        height, width = image.shape[:2]
        # As torchvision rounds it.
        top, left = round((height - self.size) / 2.0), round((width - self.size) / 2.0)
        return T.CropTransform(left, top, self.size, self.size, width, height)


def center_crop(*, short_side: int = 256, size: int = 224) -> list[T.Augmentation]:
    """Resize the short side (bicubic, with antialiasing), then crop the center, for evaluation.

    Args:
        short_side: pixels; not less than ``size``.
        size: side of the crop, pixels.
    Raises: ValueError if the crop is larger than the resized image.
    Source: microsoft/FocalNet:data/build.py (build_transform, TEST.CROP).
    """
    if size > short_side:
        raise ValueError(f"A crop of {size} px does not fit a short side of {short_side} px.")
    return [BicubicResize(short_side), CenterCrop(size)]
