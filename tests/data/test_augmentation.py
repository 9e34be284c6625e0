"""Resizing without antialiasing, against PyTorch's interpolation."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import transforms as T

from focalnet_det.data.augmentation import evaluation_resize, multiscale_or_crop, scaled

IMAGE: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def resized(image: NDArray[np.uint8], short_side: int, antialias: bool) -> NDArray[np.uint8]:
    inputs = T.AugInput(image)
    T.AugmentationList(evaluation_resize(short_side=short_side, antialias=antialias))(inputs)
    return inputs.image


@pytest.mark.parametrize(("short_side", "width"), [(36, 48), (135, 180)])
@pytest.mark.parametrize("antialias", [True, False])
def test_values(short_side: int, width: int, antialias: bool) -> None:
    x = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(
        x, (short_side, width), mode="bilinear", align_corners=False, antialias=antialias
    )
    actual = torch.from_numpy(resized(IMAGE, short_side, antialias).copy()).permute(2, 0, 1)
    # Both libraries round twice, rows and columns.
    assert (actual - expected[0]).abs().max() <= 1.01


def test_the_two_differ_where_images_shrink_alone() -> None:
    small, large = ([resized(IMAGE, s, a).astype(int) for a in (True, False)] for s in (36, 135))
    assert abs(small[0] - small[1]).mean() > 10
    assert abs(large[0] - large[1]).max() <= 1


def test_labels_coordinates_and_grey_images() -> None:
    inputs = T.AugInput(IMAGE[..., :1])
    transform = T.AugmentationList(evaluation_resize(short_side=45, antialias=False))(inputs)
    assert inputs.image.shape == (45, 60, 1)
    labels = transform.apply_segmentation(IMAGE[..., 0])
    assert set(np.unique(labels)) <= set(np.unique(IMAGE[..., 0]))
    assert transform.apply_coords(np.array([[120.0, 90.0]])).tolist() == [[60.0, 45.0]]


def test_other_policies_take_the_option_and_augmentation_at_test_time_keeps_it() -> None:
    policy = multiscale_or_crop(antialias=False)[1].choices
    kinds = {type(a).__name__ for c in policy for a in c.augs} - {"RandomCrop"}
    assert kinds == {"PlainResizeShortestEdge"}
    (larger,) = scaled(evaluation_resize(short_side=40, antialias=False), 1.5)
    assert type(larger).__name__ == "PlainResizeShortestEdge"
    assert larger.short_edge_length == (60, 60)
