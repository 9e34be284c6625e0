"""Training curves: what is read, how it is smoothed, what is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt

from focalnet_det.visualization import curves
from focalnet_det.visualization.curves import read_curves, save_curves, smoothed


def write(folder: Path, *, scores: bool = True) -> Path:
    lines = [
        json.dumps({"iteration": k, "total_loss": 4.0 / (k + 1), "loss_mask": 0.5, "lr": 1e-3})
        for k in range(0, 100, 10)
    ]
    if scores:
        row = {"iteration": 99, "val/segm/AP": 31.0, "val/segm/AP-cat": 99.0, "val/sem_seg/mIoU": 4}
        lines.append(json.dumps(row))
    path = folder / "metrics.json"
    path.write_text("\n".join([*lines, '{"iteration": 100, "total_lo']))
    return path


def test_numbers_are_read_by_name(tmp_path: Path) -> None:
    found = read_curves(write(tmp_path))
    assert found["total_loss"] == (
        list(range(0, 100, 10)),
        [4.0 / (k + 1) for k in range(0, 100, 10)],
    )
    assert found["val/segm/AP"] == ([99], [31.0])


@pytest.mark.parametrize("width", [1, 2, 5, 30])
def test_smoothing_is_a_mean_of_neighbours(width: int) -> None:
    values = np.sin(np.arange(17.0)).tolist()
    half = width // 2
    expected = [np.mean(values[max(0, k - half) : k + half + 1]) for k in range(17)]
    np.testing.assert_allclose(smoothed(values, width), expected, atol=1e-12)


@pytest.mark.parametrize("scores", [True, False])
def test_panels(scores: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []

    def close(figure: object) -> None:
        drawn.extend([str(line.get_label()) for line in a.get_lines()] for a in figure.axes)

    monkeypatch.setattr(curves.plt, "close", close)
    assert save_curves(write(tmp_path, scores=scores), tmp_path / "out/curves.png")
    monkeypatch.undo()
    plt.close("all")
    expected = [["total", "mask"], ["learning rate"]]
    assert drawn == ([*expected, ["val/segm/AP", "val/sem_seg/mIoU"]] if scores else expected)
    with Image.open(tmp_path / "out/curves.png") as picture:
        assert picture.size == (550 * (2 + scores), 418)


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not save_curves(tmp_path / "absent.json", tmp_path / "curves.png")
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "val/bbox/AP": 1.0}\n')
    assert not save_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
