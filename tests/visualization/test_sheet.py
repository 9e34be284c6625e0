"""Pages have no gaps, and galleries keep order and aspect ratios."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focalnet_det.visualization.sheet import (
    GALLERY_HEIGHT,
    PAGE_WIDTH,
    Row,
    enlarged,
    gallery,
    nearest,
    panel_width,
    save_page,
)


def flat(height: int, width: int, value: int = 90) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_rows_fill_the_page(tmp_path: Path) -> None:
    panels = [("", flat(100, 150)), ("", flat(100, 70)), ("", flat(300, 300))]
    save_page([Row(panels=panels)], tmp_path / "a" / "page.png")
    with Image.open(tmp_path / "a" / "page.png") as picture:
        pixels = np.asarray(picture)[..., 0]
    assert pixels.shape[1] == PAGE_WIDTH
    # White columns are the two gaps of 8 px alone, and no row is white.
    white = (pixels == 255).all(axis=0)
    assert white.sum() == pytest.approx(16, abs=2)
    assert not (pixels == 255).all(axis=1).any()


def test_titles_and_legends_take_their_place(tmp_path: Path) -> None:
    names = [(f"class number {i}", (10, 20, 30)) for i in range(40)]
    row = Row(panels=[("a title that is far too long for it " * 20, flat(100, 400))], legend=names)
    save_page([row], tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture).astype(int)
    image = 360  # 1440 px wide, 100 of 400
    lines, rest = divmod(pixels.shape[0] - 24 - image, 24)
    assert rest == 0
    assert lines > 1
    swatches = (pixels[24 + image :] == (10, 20, 30)).all(axis=2)
    # 12 px with a border.
    assert swatches.sum() == pytest.approx(40 * 11 * 11, rel=0.05)


def test_galleries_fill_rows() -> None:
    random = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in random.integers(60, 300, (23, 2))]
    rows, left = gallery(sizes), list(sizes)
    assert len(rows) > 2
    for row in rows:
        taken, left = left[: len(row)], left[len(row) :]
        assert sum(row) + 8 * (len(row) - 1) == pytest.approx(PAGE_WIDTH, abs=len(row))
        heights = [width * h / w for width, (h, w) in zip(row, taken, strict=True)]
        # One height, near the usual one.
        assert np.ptp(heights) < 5
        assert 0.5 * GALLERY_HEIGHT < heights[0] < 2 * GALLERY_HEIGHT
    assert left == []
    assert [len(row) for row in gallery(sizes[:1])] == [1]


def test_nearest_takes_the_value_at_the_middle_of_each_pixel() -> None:
    values = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(nearest(values, (4, 2)), [[1, 2], [1, 2], [3, 4], [3, 4]])
    np.testing.assert_array_equal(nearest(np.arange(9)[None], (1, 3)), [[1, 4, 7]])


def test_small_images_are_enlarged() -> None:
    assert enlarged(flat(42, 60)).shape == (420, 600, 3)
    assert enlarged(flat(500, 60)).shape == (500, 60, 3)
    assert enlarged(flat(500, 60), panel_width(3)).shape[1] == (PAGE_WIDTH - 16) // 3
