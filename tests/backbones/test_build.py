"""Backbones by name: what is refused, and which names there are."""

from typing import Any

import pytest

from focalnet_det import create_backbone, list_backbones
from tests.helpers.shrunk import NAMES

# Arguments


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1, 1)}, "one entry per stage, got 3, 4 and 4"),
        ({"focal_levels": (2, 2)}, "one entry per stage, got 4, 2 and 4"),
        ({"focal_windows": (3,) * 5}, "one entry per stage, got 4, 4 and 5"),
        ({"depths": (1, 0, 1, 1)}, "depths must be integers between 1 and"),
        ({"focal_levels": (2, 2, -1, 2)}, "focal_levels must be integers between 0 and"),
        ({"focal_windows": (3, 4, 3, 3)}, r"must be odd, got \(3, 4, 3, 3\)"),
        (
            {"focal_windows": (3, -1, 3, 3)},
            r"focal_windows must be integers between 1 and .*\(3, -1, 3, 3\)",
        ),
        ({"out_features": ("stage5",)}, "must be some of .* got"),
        ({"out_features": ("res2",)}, "must be some of"),
        ({"out_features": "stage1"}, "must be some of"),
        ({"out_features": ()}, "must be some of"),
        ({"frozen_stages": 5}, r"and 4, got 5"),
        ({"frozen_stages": -1}, r"and 4, got -1"),
        ({"frozen_stages": 3, "out_features": ("stage2",)}, r"and 2, got 3"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"patch_size": 6}, "power of two"),
        ({"patch_size": 2}, "power of two"),
    ],
)
def test_bad_arguments_are_errors(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone("focalnet_nano", **overrides)


def test_unknown_variants_and_options_name_the_known_ones() -> None:
    with pytest.raises(KeyError, match="'focalnet_tinny'.*focalnet_tiny_srf"):
        create_backbone("focalnet_tinny")
    with pytest.raises(TypeError, match=r"focal_window\. Known: .*focal_windows"):
        create_backbone("focalnet_tiny_srf", focal_window=9)
    with pytest.raises(TypeError, match="source"):
        create_backbone("focalnet_tiny_srf", source="here")


def test_variants_can_be_listed_by_pattern() -> None:
    assert list_backbones("focalnet_tiny_*") == [
        "focalnet_tiny_deeper",
        "focalnet_tiny_iso",
        "focalnet_tiny_lrf",
        "focalnet_tiny_srf",
    ]
    assert list_backbones("nothing*") == []
    assert list_backbones() == NAMES
