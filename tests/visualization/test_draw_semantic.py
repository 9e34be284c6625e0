"""Colours over images, a legend, and bars in order."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import Metadata

from focalnet_det.visualization import draw_semantic as semantic
from focalnet_det.visualization.draw_semantic import (
    WRONG,
    compare_semantic,
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


def test_comparison_names_the_classes_and_marks_the_errors(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    truth = np.full((20, 30), 255)
    truth[:10] = 2
    predicted = np.full((20, 30), 2)
    predicted[:, :6] = 0
    rows = [(tmp_path / "i.png", truth, predicted, "first")]
    pages: list[Any] = []
    with mock.patch.object(semantic, "save_page", lambda page, path: pages.extend(page)):
        save_comparison(rows, ["sky", "road", "car"], tmp_path / "c.png")
    (row,) = pages
    assert [name for name, _ in row.legend] == ["sky", "car"]
    # 6 of 30 columns of the labeled half.
    assert [title for title, _ in row.panels] == [
        *("first", "ground truth", "prediction", "wrong: 20.0% of the labeled pixels")
    ]
    errors = row.panels[3][1].astype(int)
    assert (errors[:10, :6] == WRONG).all()
    assert (errors[10:] == 0).all()
    assert not (errors[:10, 6:] == WRONG).all(axis=2).any()

    save_comparison(rows, ["sky", "road", "car"], tmp_path / "out/c.png")
    picture = np.asarray(Image.open(tmp_path / "out/c.png").convert("RGB"))
    red, green, blue = (round(0.6 * c) for c in palette(3)[2])
    drawn = np.abs(picture.astype(int) - (red, green, blue)).max(axis=2) <= 2
    assert drawn.sum() > 1000


def test_outputs_of_a_model_are_compared(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    labels = np.zeros((20, 30), dtype=np.uint8)
    labels[:, 15:] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {
        "file_name": str(tmp_path / "i.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }
    scores = torch.zeros(2, 20, 30)
    scores[1, :, 12:] = 1
    metadata = Metadata(name="two_regions", stuff_classes=["grass", "sky"])
    row = compare_semantic(record, {"sem_seg": scores}, metadata, 0.5)
    assert row.panels[0][0] == "i.png"
    assert row.panels[3][0] == "wrong: 10.0% of the labeled pixels"


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
