"""Crops of whole images against Detectron2's."""

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import transforms as T
from detectron2.structures.masks import polygons_to_bitmask

from focalnet_det.data.augmentation import RandomCrop


@pytest.mark.parametrize("size", [(20, 30), (50, 60)])
def test_a_whole_image_is_left_alone(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    crops = [kind("absolute", size).get_transform(image) for kind in (RandomCrop, T.RandomCrop)]
    assert isinstance(crops[0], T.NoOpTransform)
    boxes = np.array([[0.0, 1, 30, 20], [3, 4, 9, 8]])
    assert np.array_equal(*(crop.apply_image(image) for crop in crops))
    assert np.array_equal(*(crop.apply_box(boxes) for crop in crops))
    for triangle in rng.uniform(0, 20, (20, 3, 2)):
        masks = [
            polygons_to_bitmask([p.reshape(-1) for p in crop.apply_polygons([triangle])], 20, 30)
            for crop in crops
        ]
        assert np.array_equal(*masks)


def test_parts_are_those_of_detectron2() -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    places = []
    for kind in (RandomCrop, T.RandomCrop):
        np.random.seed(5)
        crop = kind("absolute", (20, 12)).get_transform(image)
        places.append((crop.x0, crop.y0, crop.w, crop.h))
    assert places[0] == places[1]
