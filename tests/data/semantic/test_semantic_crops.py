"""Sizes, crops and colours of the semantic recipe, worked out by hand."""

from unittest import mock

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import transforms as T

from focalnet_det.data.semantic.semantic_crops import (
    PhotometricDistortion,
    PhotometricTransform,
    RandomRatioResize,
    semantic_crops,
)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((480, 640), 1.0, (512, 683)),  # 640 * 512 / 480 = 682.7
        ((480, 640), 0.5, (256, 341)),
        ((480, 640), 2.0, (1024, 1365)),
        ((683, 512), 1.0, (683, 512)),
        ((100, 1000), 1.0, (205, 2048)),  # the long side decides
        # int(512 * 0.7531) = 385, not 385.6
        ((480, 640), 0.7531, (385, 513)),
    ],
)
def test_random_ratio(size: tuple[int, int], ratio: float, expected: tuple[int, int]) -> None:
    augmentation = RandomRatioResize(2048, 512, (0.5, 2.0))
    image = np.zeros((*size, 3), dtype=np.uint8)
    with mock.patch.object(np.random, "uniform", return_value=ratio) as uniform:
        transform = augmentation.get_transform(image)
    uniform.assert_called_once_with(0.5, 2.0)
    assert transform.apply_image(image).shape == (*expected, 3)


def pixel(transform: PhotometricTransform, *rgb: int) -> list[int]:
    image = np.array([[rgb]], dtype=np.uint8)
    before = image.copy()
    result = transform.apply_image(image)[0, 0].tolist()
    np.testing.assert_array_equal(image, before)
    return result


def test_photometric_by_hand() -> None:
    assert pixel(PhotometricTransform(), 10, 20, 30) == [10, 20, 30]
    assert pixel(PhotometricTransform(brightness=20), 10, 240, 30) == [30, 255, 50]
    assert pixel(PhotometricTransform(brightness=-20), 10, 240, 30) == [0, 220, 10]
    assert pixel(PhotometricTransform(contrast=1.5), 10, 200, 31) == [15, 255, 46]
    # Red, hue 0, to yellow at 60 degrees, and to green at 120.
    assert pixel(PhotometricTransform(hue=30), 200, 0, 0) == [200, 200, 0]
    assert pixel(PhotometricTransform(hue=60), 200, 0, 0) == [0, 200, 0]
    assert pixel(PhotometricTransform(hue=-60), 200, 0, 0) == [0, 0, 200]
    assert pixel(PhotometricTransform(hue=60, channels="BGR"), 0, 0, 200) == [0, 200, 0]
    # Half the saturation: the other channels come half way to the largest.
    assert pixel(PhotometricTransform(saturation=0.5), 200, 0, 0) == pytest.approx(
        [200, 100, 100], abs=1
    )
    # Contrast of a pixel that saturates: before the colours, 300 is cut to 255.
    first = PhotometricTransform(contrast=1.5, saturation=0.5, contrast_first=True)
    last = PhotometricTransform(contrast=1.5, saturation=0.5, contrast_first=False)
    assert pixel(first, 200, 0, 0) == pytest.approx([255, 128, 128], abs=1)
    assert pixel(last, 200, 0, 0) == pytest.approx([255, 150, 150], abs=2)


def test_labels_do_not_change_colour() -> None:
    labels = np.array([[1, 2]])
    transform = PhotometricTransform(brightness=9)
    np.testing.assert_array_equal(transform.apply_segmentation(labels), labels)


def test_each_change_is_drawn_half_the_time() -> None:
    np.random.seed(0)
    drawn = [PhotometricDistortion().get_transform(np.zeros((1, 1, 3))) for _ in range(2000)]
    for name, neutral in (("brightness", 0), ("contrast", 1), ("saturation", 1)):
        values = np.array([getattr(t, name) for t in drawn])
        changed = values != neutral
        assert changed.mean() == pytest.approx(0.5, abs=0.05)
    assert min(t.brightness for t in drawn) < -30
    assert max(t.brightness for t in drawn) > 30
    assert {t.hue for t in drawn} == set(range(-18, 18))
    assert np.mean([t.contrast_first for t in drawn]) == pytest.approx(0.5, abs=0.05)


def test_recipe_crops_where_no_class_covers_more_than_its_share() -> None:
    np.random.seed(0)
    image = np.zeros((64, 256, 3), dtype=np.uint8)
    labels = np.zeros((64, 256), dtype=np.uint8)
    labels[:, 120:160] = 1
    augmentations = semantic_crops(
        crop=64, short_side=64, long_side=256, ratios=(1.0, 1.0), photometric=False
    )
    shares = []
    for _ in range(100):
        augmented = T.AugInput(image, sem_seg=labels)
        T.AugmentationList(augmentations)(augmented)
        assert augmented.image.shape == (64, 64, 3)
        shares.append(max((augmented.sem_seg == 0).mean(), (augmented.sem_seg == 1).mean()))
    # Without the rule 55 % of the crops show background alone; ten tries miss 1 in 100.
    assert np.mean(np.array(shares) < 0.75) > 0.9


def test_recipe_is_the_published_one() -> None:
    resize, crop, flip, colours = semantic_crops()
    assert (resize.long_side, resize.short_side, resize.ratios) == (2048, 512, (0.5, 2.0))
    assert crop.crop_aug.crop_size == (512, 512)
    assert (crop.single_category_max_area, crop.ignored_category) == (0.75, 255)
    assert (flip.prob, flip.horizontal) == (0.5, True)
    assert isinstance(colours, PhotometricDistortion)
    assert len(semantic_crops(photometric=False)) == 3
