"""How far results are apart."""

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; 0 if nothing differs."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max()
    return 0.0 if difference == 0 else float(difference / expected.abs().max())


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative error of tensors of the same names."""
    assert actual.keys() == expected.keys()
    return max(relative_error(actual[name], expected[name]) for name in expected)
