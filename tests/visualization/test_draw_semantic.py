"""Colours over images, a legend, and bars in order."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.visualization import draw_semantic as semantic
from focalnet_det.visualization.draw_semantic import (
    overlay,
    palette,
    save_comparison,
    save_iou_chart,
)


def test_palette_has_a_colour_of_its_own_for_every_class() -> None:
    colors = np.array(palette(150))
    assert colors.shape == (150, 3)
    differences = np.abs(colors[:, None] - colors[None]).max(axis=2) + 999 * np.eye(150)
    assert differences.min() == 9
    assert min(differences[i, i + 1] for i in range(149)) == 99
    assert palette(11) == palette(150)[:11]


def test_overlay_by_hand() -> None:
    image = np.full((1, 3, 3), 100, dtype=np.uint8)
    labels = np.array([[0, 1, 255]])
    result = overlay(image, labels, [(255, 0, 0), (0, 200, 50)], opacity=0.6)
    np.testing.assert_array_equal(result[0], [[193, 40, 40], [40, 160, 70], [40, 40, 40]])


def test_comparison_names_the_classes_of_each_row(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    truth = np.full((20, 30), 255)
    truth[:10] = 2
    predicted = np.zeros((20, 30), dtype=int)
    legends = []
    original = semantic.add_legend

    def noted(axis: plt.Axes, shown: list[int], names: list[str], colors: object) -> None:
        original(axis, shown, names, colors)
        legends.append([text.get_text() for text in axis.get_legend().get_texts()])

    with mock.patch.object(semantic, "add_legend", noted):
        rows = [(tmp_path / "i.png", truth, predicted, "first")]
        save_comparison(rows, ["sky", "road", "car"], tmp_path / "out/c.png")
    assert legends == [["sky", "car"]]
    picture = np.asarray(Image.open(tmp_path / "out/c.png").convert("RGB"))
    red, green, blue = (round(0.6 * c) for c in palette(3)[2])
    drawn = np.abs(picture.astype(int) - (red, green, blue)).max(axis=2) <= 2
    assert drawn.sum() > 1000


def test_bars_are_in_order_and_absent_classes_last(tmp_path: Path) -> None:
    with mock.patch.object(plt, "close"):
        save_iou_chart({"sky": 50.0, "ghost": float("nan"), "car": 80.0}, tmp_path / "iou.png")
        axis = plt.gcf().axes[0]
        assert [text.get_text() for text in axis.get_yticklabels()] == ["car", "sky", "ghost"]
        assert [bar.get_width() for bar in axis.patches] == [80, 50, 0]
        shown = [text.get_text() for text in axis.texts]
        assert shown == ["80.0", "50.0", "no ground truth"]
    plt.close("all")
    assert (tmp_path / "iou.png").stat().st_size > 1000
