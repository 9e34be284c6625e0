"""Augmentation against timm's and torchvision's own, and the label order of 22k against timm's."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("timm", reason="timm is a test dependency")

import timm
from detectron2.data import transforms as T
from torchvision import transforms as V

from focalnet_det.data.classification.class_augmentation import center_crop, class_augmentation
from focalnet_det.data.classification.class_sets import imagenet1k_synsets, imagenet22k_synsets


def noise(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(3).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def augmented(augmentations: list[T.Augmentation], image: np.ndarray) -> np.ndarray:
    given = T.AugInput(image.copy())
    T.AugmentationList(augmentations)(given)
    return given.image


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", ""])
def test_training_images_are_those_of_timm(policy: str) -> None:
    image = noise(120, 160)
    ours = class_augmentation(size=64, auto_augment=policy)
    theirs = timm.data.create_transform(
        64, is_training=True, auto_augment=policy or None, interpolation="bicubic", normalize=False
    )
    for value in range(4):
        seed(value)
        found = augmented(ours, image)
        seed(value)
        expected = theirs(Image.fromarray(image))
        assert found.shape == (64, 64, 3)
        np.testing.assert_array_equal(found.transpose(2, 0, 1), expected.numpy())


@pytest.mark.parametrize("size", [(300, 401), (120, 90), (224, 256), (64, 1000)])
def test_the_center_crop_is_that_of_torchvision(size: tuple[int, int]) -> None:
    image = noise(*size)
    found = augmented(center_crop(short_side=256, size=224), image)
    expected = V.Compose(
        [V.Resize(256, V.InterpolationMode.BICUBIC, antialias=True), V.CenterCrop(224)]
    )(Image.fromarray(image))
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_a_crop_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a short side of 200"):
        center_crop(short_side=200, size=224)


def test_the_first_classes_of_22k_are_those_of_1k() -> None:
    info = Path(timm.__file__).parent / "data/_info"
    assert list(imagenet1k_synsets()) == (info / "imagenet_synsets.txt").read_text().split()
    synsets = imagenet22k_synsets()
    assert len(synsets) == len(set(synsets)) == 21842
    # Of the published label map, at both ends of its gap and at its own end.
    assert {synsets[0], synsets[849], synsets[851]} == {"n01440764", "n04398044", "n04404412"}
    assert (synsets[1000], synsets[1140], synsets[21841]) == ("n00004475", "n00475273", "n15102894")
