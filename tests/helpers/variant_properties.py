"""Stages, losses and comparisons for properties of every variant."""

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import relative_error
from tests.helpers.shrunk import NAMES

ALL = ("stage1", "stage2", "stage3", "stage4")

STRIDES = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

every_variant = pytest.mark.parametrize("name", NAMES)


def stages(name: str) -> tuple[str, ...]:
    """An isotropic network works at stride 16 alone."""
    return ("stage3",) if name.endswith("_iso") else ALL


def random_loss(features: dict[str, Tensor]) -> Tensor:
    """A sum in which every output value has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    return sum(
        (feature * torch.randn(feature.shape, generator=generator).to(feature)).sum()
        for feature in features.values()
    )


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        assert relative_error(actual[key], expected[key]) <= tolerance, key
