"""Instances drawn on images: the right pixels take the class's colour, the others stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from focalnet_det.visualization.comparison import save_comparison
from focalnet_det.visualization.draw_instances import (
    MARK,
    class_colors,
    compare_instances,
    draw_ground_truth,
    draw_instances,
    object_colors,
    read_rgb,
)

# High enough not to be enlarged, so that drawn and original pixels correspond.
HEIGHT, WIDTH = 480, 640
GREY = 128
# (x0, y0, x1, y1); the label is drawn at the upper left corner of a box.
BOX = (60, 80, 260, 240)
FAR = (slice(300, 480), slice(330, 640))


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(name="two_classes", thing_classes=["disc", "plate"])


def polygon(box: tuple[int, int, int, int]) -> list[list[int]]:
    x0, y0, x1, y1 = box
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def annotation(box: tuple[int, int, int, int], category: int, **fields: Any) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    return {
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category,
        "segmentation": polygon(box),
        "iscrowd": 0,
        **fields,
    }


def record(
    folder: Path, *annotations: dict[str, Any], size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Any:
    path = folder / "image.png"
    Image.fromarray(np.full((*size, 3), GREY, dtype=np.uint8)).save(path)
    height, width = size
    return {
        "file_name": str(path),
        "height": height,
        "width": width,
        "image_id": 1,
        "annotations": list(annotations),
    }


def draw_predictions(
    item: dict[str, Any], found: Instances, metadata: Metadata, *, min_score: float
) -> np.ndarray:
    return draw_instances(read_rgb(item), found, metadata, min_score=min_score)


def change(image: np.ndarray) -> np.ndarray:
    """(H, W) largest difference of any channel from the grey image."""
    return np.abs(image.astype(int) - GREY).max(axis=2)


def assert_filled(image: np.ndarray, box: tuple[int, int, int, int], color: Any) -> None:
    """The inside of the box is grey blended with the colour."""
    x0, y0, x1, y1 = box
    inside = image[y0 + 40 : y1 - 10, x0 + 90 : x1 - 10].reshape(-1, 3).astype(float)
    shift = np.median(inside, axis=0) - GREY
    towards = np.array(color, dtype=float) - GREY
    assert np.abs(shift).max() > 20
    # Blending moves every channel by the same share of the way.
    share = shift @ towards / (towards @ towards)
    assert 0.2 < share < 1
    np.testing.assert_allclose(shift, share * towards, atol=3)


def instances(
    *boxes: tuple[int, int, int, int], scores: list[float], masks: bool = True
) -> Instances:
    result = Instances((HEIGHT, WIDTH))
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float).reshape(-1, 4))
    result.scores = torch.tensor(scores)
    result.pred_classes = torch.arange(len(boxes)) % 2
    if masks:
        result.pred_masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(result.pred_masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
    return result


def test_colors_are_distinct_until_they_repeat() -> None:
    for count in (1, 10, 11, 20):
        colors = class_colors(count)
        assert len(set(colors)) == len(colors) == count
        assert all(0 <= channel <= 1 for color in colors for channel in color)
    # The first two of matplotlib's tab10, which its documentation calls blue and orange.
    assert np.allclose(class_colors(10)[:2], np.array([(31, 119, 180), (255, 127, 14)]) / 255)
    assert class_colors(45)[40:] == class_colors(45)[:5]


def test_ground_truth_fills_the_mask_and_nothing_far_away(
    tmp_path: Path, metadata: Metadata
) -> None:
    image = draw_ground_truth(record(tmp_path, annotation(BOX, 1)), metadata)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == np.uint8
    assert_filled(image, BOX, (255, 127, 14))
    assert change(image)[FAR].max() <= 2
    # Beyond the box, its lines and its label, less than a tenth of the image has changed.
    x0, y0, x1, y1 = BOX
    outside = change(image) > 2
    outside[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] = False
    assert outside.mean() < 0.1


def test_crowds_are_left_out(tmp_path: Path, metadata: Metadata) -> None:
    crowd = annotation((350, 310, 620, 470), 0, iscrowd=1)
    image = draw_ground_truth(record(tmp_path, annotation(BOX, 1), crowd), metadata)
    assert change(image)[FAR].max() <= 2
    assert_filled(image, BOX, (255, 127, 14))
    assert change(draw_ground_truth(record(tmp_path, crowd), metadata)).max() <= 2


def test_records_without_annotations(tmp_path: Path, metadata: Metadata) -> None:
    assert change(draw_ground_truth(record(tmp_path), metadata)).max() <= 2
    item = record(tmp_path)
    del item["annotations"]
    assert change(draw_ground_truth(item, metadata)).max() <= 2


def test_small_images_are_enlarged(tmp_path: Path, metadata: Metadata) -> None:
    box = (4, 6, 40, 30)
    image = draw_ground_truth(record(tmp_path, annotation(box, 0), size=(48, 64)), metadata)
    # 420 / 48 = 8.75 times, give or take a pixel.
    assert image.shape[0] in (419, 420, 421)
    assert image.shape[1] in (559, 560, 561)
    assert change(image)[300:, 400:].max() <= 2
    assert np.median(change(image)[100:250, 200:340]) > 20


def test_predictions_above_the_threshold_are_drawn(tmp_path: Path, metadata: Metadata) -> None:
    far_box = (350, 310, 620, 470)
    found = instances(BOX, far_box, scores=[0.9, 0.4])
    item = record(tmp_path)
    image = draw_predictions(item, found, metadata, min_score=0.5)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert_filled(image, BOX, (31, 119, 180))
    assert change(image)[FAR].max() <= 2

    both = draw_predictions(item, found, metadata, min_score=0.4)
    assert_filled(both, BOX, (31, 119, 180))
    assert_filled(both, far_box, (255, 127, 14))


def test_boxes_alone_are_outlined(tmp_path: Path, metadata: Metadata) -> None:
    found = instances(BOX, scores=[0.9], masks=False)
    changed = change(draw_predictions(record(tmp_path), found, metadata, min_score=0.5))
    x0, y0, x1, y1 = BOX
    assert (changed[y0 + 40 : y1 - 10, x1 - 3 : x1 + 3].max(axis=1) > 20).all()
    assert np.median(changed[y0 + 40 : y1 - 10, x0 + 90 : x1 - 10]) <= 2


@pytest.mark.parametrize("masks", [True, False])
def test_no_predictions(masks: bool, tmp_path: Path, metadata: Metadata) -> None:
    for found in (instances(scores=[], masks=masks), instances(BOX, scores=[0.1], masks=masks)):
        image = draw_predictions(record(tmp_path), found, metadata, min_score=0.5)
        assert change(image).max() <= 2


class StandIn(nn.Module):
    """Predicts one fixed instance, and notes whether gradients are recorded."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        self.grad_enabled = torch.is_grad_enabled()
        assert [set(item) for item in batch] == [{"image", "height", "width"}]
        return [{"instances": instances(BOX, scores=[0.8])}]


def test_comparison(tmp_path: Path, metadata: Metadata) -> None:
    item = record(tmp_path, annotation(BOX, 1))
    tensor = torch.full((3, HEIGHT, WIDTH), GREY, dtype=torch.uint8)
    given = {"image": tensor, "height": HEIGHT, "width": WIDTH}
    path = tmp_path / "new" / "folder" / "comparison.png"
    model = StandIn().eval()
    save_comparison(model, [item, item], [given, given], metadata, path, compare=compare_instances)

    assert not model.grad_enabled
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # Three panels of (1440 - 2 x 8) / 3 px and 3/4 of that, a title and a legend of 24 px
        # each; two rows, 8 px apart.
        assert picture.size == (1440, 2 * (356 + 48) + 8)
        pixels = np.asarray(picture.convert("RGB")).astype(int)[24 : 24 + 356]
    # Three columns: no colour in the image, orange ground truth, blue prediction. They are of
    # different classes, so that both are framed in red.
    redness = pixels[..., 0] - pixels[..., 2]
    framed = np.abs(pixels - MARK).max(axis=2) <= 8
    image, truth, prediction = np.array_split(redness, 3, axis=1)
    assert np.abs(image).max() < 10
    assert (truth > 40).mean() > 0.02
    assert (prediction < -40).mean() > 0.02
    frames = [part.sum() for part in np.array_split(framed, 3, axis=1)]
    assert frames[0] == 0
    assert min(frames[1:]) > 300


def test_matched_objects_have_no_frames(tmp_path: Path, metadata: Metadata) -> None:
    item = record(tmp_path, annotation(BOX, 0))
    row = compare_instances(item, {"instances": instances(BOX, scores=[0.8])}, metadata, 0.5)
    assert [title for title, _ in row.panels] == ["image.png", "ground truth: 1", "prediction: 1"]
    assert row.legend == [("disc", (31, 119, 180))]
    for _, picture in row.panels:
        assert not (np.abs(picture.astype(int) - MARK).max(axis=2) <= 8).any()
    below = compare_instances(item, {"instances": instances(BOX, scores=[0.4])}, metadata, 0.5)
    assert [title for title, _ in below.panels][1:] == [
        "ground truth: 1, 1 missed (dashed)",
        "prediction: 0",
    ]


def test_objects_of_the_only_class_have_a_color_each(tmp_path: Path) -> None:
    assert len(set(object_colors([0] * 30, 1))) == 30
    colors = object_colors([3, 79, 3], 80)
    assert colors[0] == colors[2] != colors[1]
    one = Metadata(name="one_class", thing_classes=["cell"])
    far_box = (350, 310, 620, 470)
    found = instances(BOX, far_box, scores=[0.9, 0.9])
    found.pred_classes[:] = 0
    image = draw_predictions(record(tmp_path), found, one, min_score=0.5).astype(int)
    first, second = (image[(y0 + y1) // 2, (x0 + x1) // 2] for x0, y0, x1, y1 in (BOX, far_box))
    assert np.abs(first - second).max() > 40


def test_overlapping_masks_mix(tmp_path: Path, metadata: Metadata) -> None:
    inner = (100, 120, 220, 200)
    image = draw_predictions(
        record(tmp_path), instances(BOX, inner, scores=[0.9, 0.9]), metadata, min_score=0.5
    )
    # Blue over grey, then orange over both: 0.55 of what was there and 0.45 of the color.
    under = 0.55 * GREY + 0.45 * np.array([31, 119, 180])
    expected = 0.55 * under + 0.45 * np.array([255, 127, 14])
    np.testing.assert_allclose(image[160, 160], expected, atol=2)


def test_as_many_inputs_as_records(tmp_path: Path, metadata: Metadata) -> None:
    with pytest.raises(ValueError, match="zip"):
        save_comparison(
            StandIn(), [record(tmp_path)], [], metadata, tmp_path / "a.png",
            compare=compare_instances,
        )  # fmt: skip
