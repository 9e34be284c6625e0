"""A run is enough to predict, and what is predicted is what the evaluation scored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools import mask as masks

from focalnet_det import add_focalnet_config
from focalnet_det.predict import Predictor
from focalnet_det.predict.trained_model import find_checkpoint
from tests.helpers.paths import CONFIGS

Train = Callable[[str], Path]


def scored_files(run: Path, name: str) -> Any:
    return json.loads(next((run / "evaluation").rglob(name)).read_text())


def images_of(shapes: Path) -> list[Path]:
    return sorted((shapes / "images/val").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet_with_views", "atss", "reppoints_v2"])
def test_instances_are_those_that_were_scored(kind: str, trained: Train, shapes: Path) -> None:
    run = trained(kind)
    predictor = Predictor(run, device="cpu")
    scored = scored_files(run, "coco_instances_results.json")
    numbers = {
        index: n for n, index in predictor.metadata.thing_dataset_id_to_contiguous_id.items()
    }
    assert predictor.metadata.thing_classes[0] == "circle"
    for path in images_of(shapes):
        expected = [row for row in scored if row["image_id"] == int(path.stem)]
        rows = instances_to_coco_json(predictor(path).instances, int(path.stem))
        assert len(rows) == len(expected) > 0
        for row, wanted in zip(rows, expected, strict=True):
            assert numbers[row["category_id"]] == wanted["category_id"]
            assert row["score"] == pytest.approx(wanted["score"], abs=1e-6)
            assert row["bbox"] == pytest.approx(wanted["bbox"], abs=1e-4)
            if kind == "mask_rcnn":
                ours, theirs = (masks.decode(r["segmentation"]) for r in (row, wanted))
                assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_classes_of_pixels_are_those_that_were_scored(trained: Train, shapes: Path) -> None:
    run = trained("upernet")
    prediction = Predictor(run, device="cpu")(
        sorted((shapes / "ade/images/validation").iterdir())[0]
    )
    saved = sorted((run / "evaluation").rglob("predictions/*.png"))[0]
    assert np.array_equal(prediction.semantic.numpy(), np.asarray(Image.open(saved)))
    # Small images are enlarged so that names are legible.
    assert prediction.draw().shape == (420, 504, 3)
    with pytest.raises(KeyError, match="predicts no 'instances'; it predicts sem_seg"):
        _ = prediction.instances


@pytest.mark.slow
def test_segments_are_those_that_were_scored(trained: Train, shapes: Path) -> None:
    run = trained("panoptic_fpn")
    path = images_of(shapes)[0]
    ids, segments = Predictor(run, device="cpu")(path).panoptic
    saved = sorted((run / "evaluation").rglob("panoptic/*.png"))[0]
    colors = np.asarray(Image.open(saved)).astype(np.int64)
    # An untrained model may find nothing; then both say so.
    expected = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
    assert np.array_equal(ids.numpy() > 0, expected > 0)
    assert len({s["id"] for s in segments}) == len(np.unique(expected[expected > 0]))
    names = {"circle", "square", "triangle", "star", "ring", "cross", "sky", "grass", "brick"}
    assert {s["name"] for s in segments} <= names | {"water", "plain"}


@pytest.mark.slow
def test_equals_detectron2s_predictor(shapes: Path, tmp_path: Path) -> None:
    """From a model that Detectron2 built and saved, through a yaml config."""
    config = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml"
    cfg = get_cfg()
    add_focalnet_config(cfg)
    cfg.merge_from_file(str(config))
    overrides = [
        *("MODEL.DEVICE", "cpu", "MODEL.FOCALNET.VARIANT", "focalnet_nano"),
        *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.WEIGHTS", ""),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "INPUT.MIN_SIZE_TEST", 128, "INPUT.FORMAT", "RGB"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 20),
        *("MODEL.CONVENTIONS", "detectron2", "SOLVER.PRECISION", "fp32"),
    ]
    cfg.merge_from_list(overrides)
    theirs = DefaultPredictor(cfg)
    torch.save({"model": theirs.model.state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    path = images_of(shapes)[0]
    ours = Predictor(tmp_path, device="cpu")(path).instances
    # It takes BGR arrays and turns them into the config's order.
    expected = theirs(np.asarray(Image.open(path).convert("RGB"))[..., ::-1])["instances"]
    assert len(ours) == len(expected) == 20
    assert torch.equal(ours.pred_classes, expected.pred_classes)
    # RoIAlign is ours here, and differs in the last bits.
    different = (ours.pred_masks != expected.pred_masks).sum().item()
    assert different <= 1e-3 * expected.pred_masks.sum().item()
    torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        ours.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=1e-2
    )


def tensors(prediction: Any) -> list[Tensor]:
    found = prediction.instances
    return [found.pred_boxes.tensor, found.scores, found.pred_classes]


@pytest.mark.slow
def test_an_image_may_come_in_any_form(trained: Train, shapes: Path) -> None:
    predictor = Predictor(trained("mask_rcnn"), device="cpu")
    path = images_of(shapes)[0]
    picture = Image.open(path).convert("RGB")
    expected = tensors(predictor(path))
    assert len(expected[0]) > 0
    for image in (str(path), picture, np.asarray(picture)):
        for actual, wanted in zip(tensors(predictor(image)), expected, strict=True):
            assert torch.equal(actual, wanted)
    gray = picture.convert("L")
    both = [tensors(predictor(image)) for image in (gray, np.asarray(gray))]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


@pytest.mark.slow
def test_a_list_gives_what_its_images_give(trained: Train, shapes: Path) -> None:
    predictor = Predictor(trained("mask_rcnn"), device="cpu", threshold=0.1)
    first, second = (Image.open(path).convert("RGB") for path in images_of(shapes))
    images = [first, second, second.resize((120, 64))]
    for actual, image in zip(predictor(images), images, strict=True):
        wanted = predictor(image)
        assert actual.image.shape == (image.height, image.width, 3)
        assert actual.names == wanted.names
        assert (actual.instances.scores >= 0.1).all()
        for one, other in zip(tensors(actual), tensors(wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_needs_nothing_else(trained: Train, shapes: Path, tmp_path: Path) -> None:
    run = trained("mask_rcnn")
    assert find_checkpoint(run) == run / "model_ema.pth"
    path = images_of(shapes)[0]
    for name in ("model_ema.pth", "model_final.pth"):
        shutil.copy(run / name, tmp_path / "moved.pth")
        moved, kept = Predictor(tmp_path / "moved.pth", device="cpu"), Predictor(run / name)
        assert moved.metadata.thing_classes == kept.metadata.thing_classes
        for one, other in zip(tensors(moved(path)), tensors(kept(path)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_what_cannot_be_used_is_named(trained: Train, tmp_path: Path) -> None:
    content = torch.load(trained("mask_rcnn") / "model_final.pth", weights_only=True)
    with pytest.raises(ValueError, match="does not exist: give the folder of a run"):
        Predictor(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        Predictor(tmp_path)
    alone = tmp_path / "alone.pth"
    torch.save({"model": content["model"]}, alone)
    with pytest.raises(ValueError, match=r"does not hold the config.*--config-file FILE"):
        Predictor(alone)
    config = CONFIGS / "COCO-Detection/retinanet_focalnet_nano_fpn_small.py"
    with pytest.raises(ValueError, match=r"weights in .*alone.pth do not fit its config"):
        Predictor(alone, config=config)
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match=r"page.pth"):
        Predictor(tmp_path / "page.pth")
    with pytest.raises(ValueError, match="threshold must be from 0 to 1, not 50"):
        Predictor(alone, threshold=50)
    with pytest.raises(ValueError, match="Device 'tpu' cannot be used"):
        Predictor(trained("mask_rcnn"), device="tpu")
    predictor = Predictor(trained("mask_rcnn"), device="cpu")
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\) and type float64 is no image"):
        predictor(np.zeros((3, 8, 8)))
    with pytest.raises(OSError, match="does not exist"):
        predictor("absent.jpg")
