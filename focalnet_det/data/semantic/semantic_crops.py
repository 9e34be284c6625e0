"""Augment training images of semantic segmentation as in the published ADE20K recipes."""

from typing import Any

import cv2
import numpy as np
from detectron2.data import transforms as T
from numpy.typing import NDArray

from ..augmentation import ResizeShortestEdge
from ..io.labels import IGNORE


class RandomRatioResize(T.Augmentation):
    """Resize to fit into a box of random size, preserving the aspect ratio.

    Args:
        long_side, short_side: sides of the box at ratio 1, pixels.
        ratios: range of the factor on both sides, sampled uniformly.
    Source: open-mmlab/mmcv:mmcv/transforms/processing.py (RandomResize).
    """

    def __init__(self, long_side: int, short_side: int, ratios: tuple[float, float]) -> None:
        super().__init__()
        self.long_side, self.short_side, self.ratios = long_side, short_side, ratios

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Sample the ratio."""
        ratio = np.random.uniform(*self.ratios)
        height, width = image.shape[:2]
        # Truncated to integers as in mmcv.
        long_side, short_side = int(self.long_side * ratio), int(self.short_side * ratio)
        factor = min(long_side / max(height, width), short_side / min(height, width))
        size = [max(1, int(side * factor + 0.5)) for side in (height, width)]
        return T.ResizeTransform(height, width, *size)


class PhotometricTransform(T.Transform):
    """Change brightness, contrast, saturation and hue of an RGB or BGR image.

    Args:
        brightness: offset, on the scale 0..255.
        contrast: factor.
        contrast_first: change the contrast before saturation and hue, instead of after them.
        saturation: factor.
        hue: offset in units of 2 degrees, as in OpenCV.
        channels: channel order, "RGB" or "BGR".
    """

    def __init__(
        self,
        *,
        brightness: float = 0.0,
        contrast: float = 1.0,
        contrast_first: bool = True,
        saturation: float = 1.0,
        hue: int = 0,
        channels: str = "RGB",
    ) -> None:
        super().__init__()
        self.brightness, self.contrast, self.contrast_first = brightness, contrast, contrast_first
        self.saturation, self.hue, self.channels = saturation, hue, channels

    def apply_image(self, img: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Transform an image, (H, W, 3), 0..255; each step rounds to integers, as in mmseg."""
        img = linear(img, 1.0, self.brightness)
        if self.contrast_first:
            img = linear(img, self.contrast, 0.0)
        if self.saturation != 1.0 or self.hue:
            rgb = self.channels == "RGB"
            code = cv2.COLOR_RGB2HSV if rgb else cv2.COLOR_BGR2HSV
            hsv: NDArray[np.uint8] = np.asarray(cv2.cvtColor(img, code), dtype=np.uint8)
            hsv[..., 1] = linear(hsv[..., 1], self.saturation, 0.0)
            hsv[..., 0] = (hsv[..., 0].astype(int) + self.hue) % 180
            back = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB if rgb else cv2.COLOR_HSV2BGR)
            img = np.asarray(back, dtype=np.uint8)
        return img if self.contrast_first else linear(img, self.contrast, 0.0)

    def apply_coords(self, coords: NDArray[Any]) -> NDArray[Any]:
        """Return coordinates unchanged."""
        return coords

    def apply_segmentation(self, segmentation: NDArray[Any]) -> NDArray[Any]:
        """Return label maps unchanged."""
        return segmentation


def linear(values: NDArray[np.uint8], factor: float, offset: float) -> NDArray[np.uint8]:
    """Compute ``factor * values + offset``, clipped to 0..255."""
    if factor == 1.0 and offset == 0.0:
        return values
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


class PhotometricDistortion(T.Augmentation):
    """Apply a random photometric transform; each of the four changes has probability 1/2.

    Source: arXiv:1512.02325, section 3.6 (its reference 14); open-mmlab/mmsegmentation:
    mmseg/datasets/transforms/transforms.py (PhotoMetricDistortion).
    """

    def __init__(self, channels: str = "RGB") -> None:
        super().__init__()
        self.channels = channels

    def get_transform(self, image: NDArray[Any]) -> T.Transform:  # noqa: ARG002
        """Sample the changes."""
        chosen = np.random.randint(2, size=4).astype(bool)
        return PhotometricTransform(
            brightness=np.random.uniform(-32, 32) if chosen[0] else 0.0,
            contrast=np.random.uniform(0.5, 1.5) if chosen[1] else 1.0,
            contrast_first=bool(np.random.randint(2)),
            saturation=np.random.uniform(0.5, 1.5) if chosen[2] else 1.0,
            hue=int(np.random.randint(-18, 18)) if chosen[3] else 0,
            channels=self.channels,
        )


def semantic_crops(
    *,
    crop: int = 512,
    short_side: int = 512,
    long_side: int = 2048,
    ratios: tuple[float, float] = (0.5, 2.0),
    largest_share: float = 0.75,
    photometric: bool = True,
    channels: str = "RGB",
) -> list[T.Augmentation]:
    """Resize randomly, crop a square, flip, and distort colors.

    Args:
        crop: side of the square, pixels; smaller images keep their size, and the model pads them.
        short_side, long_side: sides of the box that images are resized to fit at ratio 1, pixels.
        ratios: range of the factor on both sides.
        largest_share: crops in which a class covers more are resampled, up to ten times.
        photometric: apply :class:`PhotometricDistortion`.
        channels: channel order, "RGB" or "BGR".
    Source: microsoft/FocalNet:semantic_segmentation/configs/_base_/datasets/ade20k.py.
    """
    augmentations = [
        RandomRatioResize(long_side, short_side, (ratios[0], ratios[1])),
        T.RandomCrop_CategoryAreaConstraint("absolute", (crop, crop), largest_share, IGNORE),
        T.RandomFlip(),
    ]
    return [*augmentations, PhotometricDistortion(channels)] if photometric else augmentations


def shortest_edge_crops(
    *,
    crop: int = 512,
    max_long_side: int = 2048,
    ratios: tuple[float, float] = (0.5, 2.0),
    photometric: bool = True,
    channels: str = "RGB",
) -> list[T.Augmentation]:
    """Random short side, square crop, photometric distortion, flip: Mask2Former's on ADE20K.

    Args:
        crop: side, pixels; an image smaller than it keeps its size and is padded by the model.
        max_long_side: pixels.
        ratios: smallest and largest short side over the crop, in steps of a tenth.
    Source: facebookresearch/Mask2Former:configs/ade20k/semantic-segmentation.
    """
    tenths = range(round(10 * ratios[0]), round(10 * ratios[1]) + 1)
    short_sides = tuple(int(crop * 0.1 * tenth) for tenth in tenths)
    augmentations: list[T.Augmentation] = [
        ResizeShortestEdge(short_sides, max_long_side, "choice"),
        T.RandomCrop_CategoryAreaConstraint("absolute", (crop, crop), 1.0, IGNORE),
    ]
    if photometric:
        augmentations.append(PhotometricDistortion(channels))
    return [*augmentations, T.RandomFlip()]
