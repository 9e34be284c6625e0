"""Labels stand beside objects, never on other objects or labels, and thin out."""

import numpy as np
import pytest

from focalnet_det.visualization.label_layout import (
    LABELED_SHARE,
    Label,
    draw_labels,
    font,
    font_size,
    interior_point,
    place_labels,
)

SIZE = (400, 600)


def label(box: tuple[int, int, int, int], text: str = "cat 93%", **fields: bool) -> Label:
    mask = np.zeros(SIZE, dtype=bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return Label(text=text, mask=mask, color=(10, 20, 30), **fields)


def line_height() -> int:
    return sum(font(font_size(*SIZE)).getmetrics())


def test_a_label_stands_above_its_object_or_else_below_or_beside_it() -> None:
    ((_, place),) = place_labels([label((200, 100, 280, 160))], SIZE)
    assert (place[0], place[3]) == (200, 100)
    # No place above at the upper border, none on either side at full width.
    ((_, place),) = place_labels([label((0, 0, 600, 30))], SIZE)
    assert place[1] == 30
    ((_, place),) = place_labels([label((200, 0, 280, 400))], SIZE)
    assert place[:2] == (280, 0)


def test_large_objects_and_regions_hold_their_labels() -> None:
    for inside in (False, True):
        ((_, place),) = place_labels([label((0, 0, 600, 400), inside=inside)], SIZE)
        assert abs((place[0] + place[2]) / 2 - 300) <= 110
        assert abs((place[1] + place[3]) / 2 - 200) <= 4
    # A region that is too small has none, even with place around it.
    assert list(place_labels([label((200, 100, 230, 130), inside=True)], SIZE)) == []


def test_dense_objects_keep_some_labels_that_cover_nothing() -> None:
    random = np.random.default_rng(3)
    corners = random.integers(0, (550, 360), (150, 2))
    dense = [label((x, y, x + 24, y + 18)) for x, y in corners.tolist()]
    placed = list(place_labels(dense, SIZE))
    assert 0 < len(placed) < len(dense)
    taken = np.zeros(SIZE, dtype=int)
    for mine, (left, top, right, bottom) in placed:
        assert 0 <= left < right <= 600
        assert 0 <= top < bottom <= 400
        others = np.any([other.mask for other in dense if other is not mine], axis=0)
        assert others[top:bottom, left:right].mean() <= 0.02
        taken[top:bottom, left:right] += 1
    assert taken.max() == 1
    assert taken.mean() <= LABELED_SHARE
    # Where there is place, all have one.
    assert len(list(place_labels(dense[:3], SIZE))) == 3


def test_urgent_labels_come_first() -> None:
    # One place below both, which are stacked at the top and as wide as the picture.
    rows = [label((0, 0, 600, 20)), label((0, 20, 600, 30), text="missed")]
    low = line_height() + 30
    wall = label((0, low, 600, 400), text="")
    texts = [found.text for found, _ in place_labels([*rows, wall], SIZE)]
    assert "missed" in texts
    urgent = [label((0, 0, 60, 20), text="a"), label((0, 0, 90, 30), text="b", urgent=True)]
    assert next(place_labels(urgent[::-1], SIZE))[0].text == "b"
    assert next(place_labels(urgent, SIZE))[0].text == "b"


def test_labels_are_drawn_where_they_are_placed() -> None:
    picture = np.full((*SIZE, 3), 128, dtype=np.uint8)
    mine = label((200, 100, 280, 160))
    ((_, (left, top, right, bottom)),) = place_labels([mine], SIZE)
    drawn = draw_labels(picture, [mine]).astype(int)
    changed = (drawn != 128).any(axis=2)
    ys, xs = changed.nonzero()
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (left, top, right, bottom)
    # White on a dark color.
    assert (drawn[changed] > 200).all(axis=1).mean() > 0.02
    assert (picture == 128).all()


def test_the_middle_of_the_widest_part() -> None:
    mask = np.zeros((50, 80), dtype=bool)
    mask[20:24, 10:60] = True
    mask[10:31, 50:71] = True
    assert interior_point(mask) == (60, 20)
    # A ring has no pixel in its middle.
    y, x = np.mgrid[:60, :60]
    ring = abs(np.hypot(y - 30, x - 30) - 20) < 4
    found = interior_point(ring)
    assert ring[found[1], found[0]]


@pytest.mark.parametrize("size", [(100, 100), (420, 560), (3000, 4000)])
def test_text_grows_with_the_picture(size: tuple[int, int]) -> None:
    assert 11 <= font_size(*size) <= 60
    assert font_size(*size) <= font_size(2 * size[0], 2 * size[1])
