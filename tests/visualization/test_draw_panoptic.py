"""Panoptic segments in pictures: colours, outlines, names, void."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from focalnet_det.visualization import draw_panoptic
from focalnet_det.visualization.comparison import save_comparison
from focalnet_det.visualization.draw_panoptic import (
    compare_panoptic,
    draw_segments,
    segments_without_partner,
)

HEIGHT, WIDTH, GREY = 440, 600, 100


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(
        name="test_panoptic_pictures",
        thing_classes=["cat", "dog"],
        stuff_classes=["things", "sky"],
        thing_colors=[(200, 0, 0), (0, 200, 0)],
        stuff_colors=[(9, 9, 9), (0, 0, 250)],
    )


def scene() -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Sky above, a dog and a cat below, void at the right."""
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    ids[:200, :500], ids[200:, :250], ids[200:, 250:500] = 7, 300, 70_000
    return ids, [
        {"id": 7, "category_id": 1, "isthing": False},
        {"id": 300, "category_id": 1, "isthing": True},
        {"id": 70_000, "category_id": 0, "isthing": True},
    ]


def image() -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), GREY, dtype=np.uint8)


def test_colours_outlines_and_void(metadata: Metadata) -> None:
    drawn = draw_segments(image(), *scene(), metadata).astype(int)
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    # 0.4 of the grey and 0.6 of the colour; things in a shade of 0.75 to 1.25 of theirs.
    np.testing.assert_allclose(drawn[30, 30], [40, 40, 190], atol=2)
    for (y, x), channel in (((420, 20), 1), ((420, 270), 0)):
        assert 0.75 * 120 - 2 <= drawn[y, x, channel] - 40 <= 1.25 * 120 + 2
        np.testing.assert_allclose(np.delete(drawn[y, x], channel), 40, atol=2)
    np.testing.assert_allclose(drawn[200, 20], 255, atol=2)
    np.testing.assert_allclose(drawn[420, 250], 255, atol=2)
    np.testing.assert_allclose(drawn[30, 550], 40, atol=2)
    again = draw_segments(image(), *scene(), metadata)
    np.testing.assert_array_equal(drawn, again)


def test_names_are_written_where_they_hide_nothing(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        draw_panoptic, "draw_labels", lambda picture, labels: (given.extend(labels), picture)[1]
    )
    ids, segments = scene()
    draw_segments(image(), ids, segments, metadata, marked={300}, mark="missed")
    found = [(label.text, label.inside, label.urgent) for label in given]
    # Regions may be covered by their name, things may not.
    assert found == [("sky", True, False), ("missed dog", False, True), ("cat", False, False)]
    for label, segment in zip(given, segments, strict=True):
        np.testing.assert_array_equal(label.mask, ids == segment["id"])


def test_segments_without_partner_by_a_slow_loop() -> None:
    random = np.random.default_rng(0)
    counts = np.zeros(3, dtype=int)
    for _ in range(60):
        maps = random.integers(0, 4, (2, 4, 4)).repeat(3, 1)
        maps[1] = np.where(random.random(maps[1].shape) < 0.75, maps[0], maps[1])
        kinds = [
            [
                {"id": i, "category_id": int(random.integers(2)), "isthing": True}
                for i in (1, 2, 3)
                if (ids == i).any()
            ]
            for ids in maps
        ]
        for segment in kinds[0]:
            segment["iscrowd"] = int(random.random() < 0.2)
        void = maps[0] == 0
        missed = {s["id"] for s in kinds[0] if not s["iscrowd"]}
        false = {s["id"] for s in kinds[1]}
        for t in kinds[0]:
            for p in kinds[1]:
                first, second = maps[0] == t["id"], maps[1] == p["id"]
                union = (first | (second & ~void)).sum()
                if t["iscrowd"] or t["category_id"] != p["category_id"]:
                    continue
                if (first & second).sum() / union > 0.5:
                    missed -= {t["id"]}
                    false -= {p["id"]}
        for p in kinds[1]:
            second = maps[1] == p["id"]
            ignored = void.copy()
            for t in kinds[0]:
                if t["iscrowd"] and t["category_id"] == p["category_id"]:
                    ignored |= maps[0] == t["id"]
            if (second & ignored).sum() / second.sum() > 0.5:
                false -= {p["id"]}
        actual = segments_without_partner((maps[0], kinds[0]), (maps[1], kinds[1]))
        assert actual == (missed, false)
        counts += [len(missed), len(false), len(kinds[1]) - len(false)]
    assert counts.min() > 10


def test_small_images_are_enlarged_and_classes_need_no_colours() -> None:
    ids, segments = scene()
    plain = Metadata(
        name="test_panoptic_plain", thing_classes=["cat", "dog"], stuff_classes=["things", "sky"]
    )
    drawn = draw_segments(image()[::4, ::4], ids[::4, ::4], segments, plain)
    assert drawn.shape[0] >= 420
    scale = drawn.shape[0] / (HEIGHT / 4)
    colors = {
        tuple(drawn[int(y / 4 * scale), int(x / 4 * scale)]) for y, x in ((30, 30), (420, 20))
    }
    assert len(colors) == 2


class StandIn(nn.Module):
    """Predicts the scene, or one instance where it has no panoptic answer."""

    def __init__(self, panoptic: bool) -> None:
        super().__init__()
        self.panoptic = panoptic

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = Instances((HEIGHT, WIDTH))
        found.pred_boxes = Boxes(torch.tensor([[50.0, 50, 300, 300]]))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        ids, segments = scene()
        answer: dict[str, Any] = {"instances": found}
        if self.panoptic:
            answer["panoptic_seg"] = (torch.as_tensor(ids), segments)
        return [answer]


@pytest.mark.parametrize("panoptic", [True, False])
def test_comparison(panoptic: bool, metadata: Metadata, tmp_path: Path) -> None:
    ids, segments = scene()
    Image.fromarray(image()).save(tmp_path / "a.png")
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colors).save(tmp_path / "segments.png")
    record: dict[str, Any] = {"file_name": str(tmp_path / "a.png")}
    if panoptic:
        record |= {"pan_seg_file_name": str(tmp_path / "segments.png"), "segments_info": segments}
    else:
        record["annotations"] = []
    path = tmp_path / "out.png"
    save_comparison(StandIn(panoptic), [record], [{}], metadata, path, compare=compare_panoptic)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    truth, prediction = np.array_split(pixels, 3, axis=1)[1:]
    blue = [(part[..., 2] - part[..., 0] > 100).mean() for part in (truth, prediction)]
    if panoptic:
        assert blue[0] == pytest.approx(blue[1], abs=0.02)
        assert blue[0] > 0.15
    else:
        # Instances instead: none, and the box of a cat.
        assert blue[0] == 0
        assert 0 < blue[1] < 0.03
