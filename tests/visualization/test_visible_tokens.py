"""The picture of what a query sees shows what the description of the networks says."""

from pathlib import Path

import numpy as np

from focalnet_det.ops.window_attention import WindowGrid
from focalnet_det.visualization import visible_tokens as keys


def test_a_window_in_the_middle_sees_thirteen_by_thirteen_tokens() -> None:
    fine, pooled = keys.cyclic_view(WindowGrid(63, 63, 7), 4 * 9 + 4)
    expected = np.zeros((63, 63), int)
    expected[25:38, 25:38] = keys.NEIGHBOR
    expected[28:35, 28:35] = keys.OWN
    assert (fine == expected).all()
    around = np.zeros((9, 9), bool)
    around[1:8, 1:8] = True
    assert (pooled == around).all()


def test_a_window_at_the_corner_sees_the_other_corners() -> None:
    fine, pooled = keys.cyclic_view(WindowGrid(28, 28, 7), 0, focal_window=3)
    rows = np.isin(np.arange(28), [25, 26, 27, *range(10)])
    assert ((fine > 0) == (rows[:, None] & rows)).all()
    assert (fine[:7, :7] == keys.OWN).all()
    assert pooled.sum() == 4
    assert pooled[:2, :2].all()


def test_version_2_sees_the_closest_tokens() -> None:
    fine, pooled = keys.nearest_view(WindowGrid(63, 63, 7), 4 * 9 + 4)
    assert (fine > 0).sum() == 128
    y, x = np.mgrid[:63, :63]
    distance = (y - 31) ** 2 + (x - 31) ** 2
    assert distance[fine > 0].max() <= distance[fine == 0].min()
    assert (fine[28:35, 28:35] == keys.OWN).all()
    assert pooled.all(), "up to 128 windows, all of them"


def test_levels_of_focalnet_add_up() -> None:
    view = keys.modulation_view(WindowGrid(21, 21, 7), (3, 5))
    assert view[10, 10] == view[11, 9] == 2
    assert view[10, 12] == view[13, 13] == 1
    assert view[10, 14] == 0


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    keys.draw_families(tmp_path / "families.png", side=28)
    from PIL import Image

    with Image.open(tmp_path / "families.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 200
