"""Test-time augmentation of boxes, masks and panoptic segments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import get_cfg, instantiate
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.modeling.test_time_augmentation import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances

from focalnet_det.data.augmentation import evaluation_resize
from focalnet_det.data.loader import build_test_loader
from focalnet_det.experiment import load_config
from focalnet_det.heads.tta import InstanceMerger, TestTimeAugmentation, nms_settings
from tests.helpers.paths import CONFIGS

NAME = "test_tta_instances"


@pytest.fixture(scope="module")
def panoptic() -> nn.Module:
    """A thin panoptic FPN with random weights that finds many things and several kinds of stuff."""
    torch.manual_seed(4)
    cfg = load_config(
        CONFIGS / "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py",
        ["model.backbone.bottom_up.embed_dim=8", "model.backbone.bottom_up.depths=[1,1,1,1]"],
    )
    model = instantiate(cfg.model).eval()
    model.combine_stuff_area_thresh = 20
    model.combine_instances_score_thresh = 0.3
    predictor = model.roi_heads.box_predictor
    predictor.cls_score.weight.data *= 400
    predictor.test_topk_per_image = 30
    model.roi_heads.mask_head.predictor.weight.data *= 1000
    model.sem_seg_head.predictor.weight.data *= 50
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    records = []
    for index, size in enumerate([(60, 80), (96, 64)]):
        path = tmp_path / f"{index}.png"
        # Blocks of one colour, which a resize changes less than noise.
        small = rng.integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
        Image.fromarray(small.repeat(4, axis=0).repeat(4, axis=1)).save(path)
        records.append({"file_name": str(path), "image_id": index})
    DatasetCatalog.register(NAME, lambda: records)
    yield tmp_path
    DatasetCatalog.remove(NAME)


def records(**options: Any) -> list[dict[str, Any]]:
    loader = build_test_loader(
        dataset=NAME,
        augmentations=evaluation_resize(short_side=64, max_long_side=256),
        num_workers=0,
        **options,
    )
    return [batch[0] for batch in loader]


def answers(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    with torch.no_grad():
        return [model([record])[0] for record in records(**options)]


def assert_same(found: dict[str, Any], plain: dict[str, Any]) -> None:
    a, b = found["instances"], plain["instances"]
    assert len(a) == len(b) > 5
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=0)
    assert torch.equal(a.pred_classes, b.pred_classes)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-5, atol=1e-4)
    # Boxes that went to the original size and back differ in the last digit, and a pixel at the
    # threshold may.
    assert (a.pred_masks != b.pred_masks).float().mean() < 1e-3
    assert (found["panoptic_seg"][0] != plain["panoptic_seg"][0]).float().mean() < 1e-2
    keys = ("id", "isthing", "category_id")
    segments = [[[s[k] for k in keys] for s in x["panoptic_seg"][1]] for x in (found, plain)]
    assert segments[0] == segments[1]


def test_one_scale_without_flip_is_plain_inference(panoptic: nn.Module, folder: Path) -> None:
    plain = answers(panoptic)
    for a, b in zip(answers(TestTimeAugmentation(panoptic), scales=(1.0,)), plain, strict=True):
        assert len({s["isthing"] for s in b["panoptic_seg"][1]}) == 2
        assert 0.01 < b["instances"].pred_masks.float().mean() < 0.5
        assert_same(a, b)
    for a, b in zip(answers(TestTimeAugmentation(panoptic)), plain, strict=True):
        assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])


def test_the_same_view_twice_changes_nothing(panoptic: nn.Module, folder: Path) -> None:
    twice = answers(TestTimeAugmentation(panoptic), scales=(1.0, 1.0))
    for a, b in zip(twice, answers(panoptic), strict=True):
        assert_same(a, b)


def test_boxes_and_masks_are_those_of_detectron2(panoptic: nn.Module, folder: Path) -> None:
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON, cfg.MODEL.LOAD_PROPOSALS = True, False, False
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = nms_settings(panoptic)
    inputs = records(scales=(1.0, 1.5), flip=True)

    def views(record: dict[str, Any]) -> list[dict[str, Any]]:
        return [dict(view) for view in record["views"]]

    class Detector(type(panoptic).__mro__[1]):  # GeneralizedRCNN, with the same parts
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.__dict__.update(panoptic.__dict__)

    reference = GeneralizedRCNNWithTTA(cfg, Detector().eval(), views, batch_size=1)
    for record in inputs:
        size = {side: record["views"][0][side] for side in ("height", "width")}
        with torch.no_grad():
            (expected,) = reference([{**record, **size, "image": None}])
            found = TestTimeAugmentation(panoptic)([record])[0]
        a, b = found["instances"], expected["instances"]
        assert len(a) == len(b) > 5
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        assert (a.pred_masks != b.pred_masks).float().mean() < 1e-3


class Given(nn.Module):
    """A detector without heads that says what it is told: a box a view, with masks or without."""

    test_nms_thresh, max_detections_per_image = 0.6, 3

    def __init__(self, boxes: list[list[list[float]]], scores: list[list[float]]) -> None:
        super().__init__()
        self.boxes, self.scores, self.calls = boxes, scores, 0

    def forward(self, x: list[dict]) -> list[dict]:
        boxes, scores = self.boxes[self.calls], self.scores[self.calls]
        self.calls += 1
        found = Instances((20, 40))
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        found.scores, found.pred_classes = torch.tensor(scores), torch.zeros(len(scores)).long()
        masks = torch.zeros(len(boxes), 20, 40, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
        found.pred_masks = masks
        return [{"instances": found}]


def two_views() -> dict[str, Any]:
    plain, flip = T.TransformList([T.NoOpTransform()]), T.TransformList([T.HFlipTransform(40)])
    image = torch.zeros(3, 20, 40)
    return {"views": [{"image": image, "transforms": t} for t in (plain, flip)]}


def test_detections_of_a_mirrored_view_come_back_and_duplicates_go() -> None:
    # In the second view, mirrored: the same object, a little off; and another one.
    boxes = [[[0.0, 0, 10, 10]], [[30.0, 0, 39, 10], [5.0, 5, 15, 20]]]
    model = Given(boxes, [[0.9], [0.8, 0.7]])
    found = TestTimeAugmentation(model)([two_views()])[0]["instances"]
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 10, 10], [25, 5, 35, 20]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])
    assert found.pred_masks[1].nonzero().min(0).values.tolist() == [5, 25]
    assert found.pred_masks[1].sum() == 10 * 15


def test_the_model_says_how_many_detections_and_what_a_duplicate_is() -> None:
    boxes = [[[10.0 * k, 0, 10 * k + 8, 8] for k in range(4)], [[0.0, 10, 8, 18]]]
    model = Given(boxes, [[0.5, 0.6, 0.7, 0.8], [0.9]])
    assert nms_settings(model) == (0.6, 3)
    found = TestTimeAugmentation(model)([two_views()])[0]["instances"]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert nms_settings(nn.Linear(1, 1)) == (0.5, 100)


def test_a_view_may_find_nothing() -> None:
    empty = Given([[], [[30.0, 0, 40, 10]]], [[], [0.8]])
    found = TestTimeAugmentation(empty)([two_views()])[0]["instances"]
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 10, 10]]


def test_what_has_no_rule() -> None:
    found = Instances((4, 4), pred_keypoints=torch.zeros(0, 17, 3))
    with pytest.raises(ValueError, match="cannot merge keypoints"):
        InstanceMerger(nn.Linear(1, 1)).add(found, two_views()["views"][0])

    class Panoptic(nn.Module):
        def forward(self, x: list[dict]) -> list[dict]:
            return [{"panoptic_seg": None}]

    with pytest.raises(ValueError, match="Panoptic has no thresholds to combine things and stuff"):
        TestTimeAugmentation(Panoptic())([two_views()])
