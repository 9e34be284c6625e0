"""Kernels of another size: arrays worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from focalnet_det.checkpoint.resize import resize_kernel


def test_growing_pads_with_zeros_around_the_centre() -> None:
    kernel = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    expected = torch.tensor(
        [
            [0.0, 0, 0, 0, 0],
            [0, 1, 2, 3, 0],
            [0, 4, 5, 6, 0],
            [0, 7, 8, 9, 0],
            [0, 0, 0, 0, 0],
        ]
    )
    assert torch.equal(resize_kernel(kernel, 5), expected)


def test_shrinking_crops_the_centre() -> None:
    kernel = torch.arange(25.0).reshape(5, 5)
    expected = torch.tensor([[6.0, 7, 8], [11, 12, 13], [16, 17, 18]])
    assert torch.equal(resize_kernel(kernel, 3), expected)
    assert torch.equal(resize_kernel(kernel, 1), torch.tensor([[12.0]]))


def test_the_same_size_changes_nothing() -> None:
    kernel = torch.randn(4, 1, 3, 3)
    assert torch.equal(resize_kernel(kernel, 3), kernel)


def test_leading_dimensions_are_kept() -> None:
    kernel = torch.arange(2 * 1 * 3 * 3.0).reshape(2, 1, 3, 3)
    grown = resize_kernel(kernel, 7)
    assert grown.shape == (2, 1, 7, 7)
    assert torch.equal(grown[:, :, 2:5, 2:5], kernel)
    assert grown.abs().sum() == kernel.abs().sum()


def test_growing_leaves_the_convolution_unchanged() -> None:
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    kernel = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    expected = F.conv2d(x, kernel, padding=1, groups=4)
    actual = F.conv2d(x, resize_kernel(kernel, 9), padding=4, groups=4)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 4), 5), ((3, 3), 4), ((3, 5), 5), ((5, 3), 5), ((5, 4), 5)]
)
def test_what_has_no_centre_is_refused(shape: tuple[int, int], size: int) -> None:
    with pytest.raises(ValueError, match="Only square kernels of odd size"):
        resize_kernel(torch.zeros(2, 1, *shape), size)
