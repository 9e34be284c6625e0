"""Classification and pretraining through the whole engine, from folders of images."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("timm", reason="timm is a test dependency")

from focalnet_det.checkpoint import load_initial_weights
from focalnet_det.create import create_classifier
from focalnet_det.data.classification.crops import export_crops
from focalnet_det.data.shapes.generate import make_shapes
from focalnet_det.engine.main import RunArguments, run
from focalnet_det.heads.image_classifier import ImageClassifier
from focalnet_det.heads.masked_pretraining import MaskedPretraining
from focalnet_det.predict import Predictor
from focalnet_det.predict.job import JobOptions, predict_sources
from tests.helpers.configs import LEAVES, names, read
from tests.helpers.paths import CONFIGS

CLASSIFIER = CONFIGS / "Shapes-Classification/classifier_focalnet_nano_small.py"
PRETRAINING = CONFIGS / "Shapes-Pretraining/simmim_focalnet_nano_small.py"
DETECTOR = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
RECIPES = [p for p in LEAVES if p.parent.name.endswith(("Classification", "Pretraining"))]
SIZES = [
    *("dataloader.train.augmentations.size=32", "dataloader.train.batch_size=4"),
    *("dataloader.test.0.augmentations.size=32", "dataloader.test.0.augmentations.short_side=32"),
    *("dataloader.train.num_workers=0", "dataloader.test.0.num_workers=0", "train.device=cpu"),
]
NARROW = ["model.backbone.embed_dim=8", "model.backbone.depths=[1,1,1,1]"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders ``train`` and ``val`` of the objects of a generated dataset."""
    root = tmp_path_factory.mktemp("classes")
    shapes = make_shapes(root / "shapes", train=100, val=15, size=(96, 96), seed=3, workers=1)
    for split in ("train", "val"):
        json_file = shapes / f"annotations/instances_{split}.json"
        counts = export_crops(json_file, shapes / "images" / split, root / split, min_side=12)
        assert sum(counts.values()) == len(list((root / split).rglob("*.png")))
    return root


def folders(crops: Path, kind: str = "class") -> dict[str, list[str]]:
    return {
        f"{kind}_images": [str(crops / "train")],
        f"val_{kind}_images": [str(crops / "val")],
    }


def train(config: Path, output: Path, data: dict[str, list[str]], *opts: str, **more: Any) -> Any:
    return run(
        RunArguments(
            config_file=str(config), opts=[*SIZES, *opts], output=str(output), **data, **more
        )
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.json").open()]
    return [{k: v for k, v in row.items() if "time" not in k} for row in rows]


@pytest.mark.slow
def test_shapes_are_learned_from_class_folders(crops: Path, tmp_path: Path) -> None:
    """With the small recipe at half its size and a quarter of its length."""
    results = train(
        CLASSIFIER,
        tmp_path,
        folders(crops),
        *("schedule.iterations=120", "schedule.warmup_iterations=20", "train.pictures=3"),
        *("dataloader.train.batch_size=24", "train.report=true"),
    )
    metrics = results["val"]["classification"]
    # Chance is 17 %.
    assert metrics["top1"] > 60
    assert metrics["top5"] > 90
    assert {f"top1-{name}" for name in ("circle", "star", "ring")} < set(metrics)
    for name in ("curves.png", "predictions.png", "evaluation/val/report.html"):
        assert (tmp_path / name).stat().st_size > 1000, name
    page = (tmp_path / "evaluation/val/report.html").read_text()
    for title in ("Largest confusions", "Confusion matrix", "Worst images", "circle"):
        assert title in page
    # The checkpoint is an official classifier, with the names of the classes.
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert content["class_names"] == ["circle", "cross", "ring", "square", "star", "triangle"]
    net = create_classifier("focalnet_nano", 6, weights=tmp_path / "model_final.pth").eval()
    net.load_state_dict(content["model"])
    predict(tmp_path, crops / "val/star")
    evaluated = train(
        CLASSIFIER,
        tmp_path / "again",
        {"val_class_images": folders(crops)["val_class_images"]},
        f"train.init_checkpoint={tmp_path}/model_final.pth",
        eval_only=True,
    )
    assert evaluated["val"]["classification"] == metrics


def predict(run_folder: Path, images: Path) -> None:
    """The run predicts what its evaluation scored, and jobs list the best classes of each image."""
    predictor = Predictor(run_folder, device="cpu")
    files = sorted(images.iterdir())[:3]
    listed = [prediction.classes for prediction in predictor([str(file) for file in files])]
    assert all(len(classes) == 5 for classes in listed)
    assert sum(classes[0][0] == "star" for classes in listed) >= 1
    options = JobOptions(output=run_folder / "predicted")
    summary = predict_sources(predictor, [images], options)
    assert summary.predicted == len(list(images.iterdir()))
    frames = json.loads((run_folder / "predicted/classes.json").read_text())
    first = next(f for f in frames if Path(f["file_name"]).name == files[0].name)
    assert [c["name"] for c in first["classes"]] == [name for name, _ in listed[0]]
    assert len(list((run_folder / "predicted/pictures").iterdir())) == summary.predicted


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that holds, while it is not empty, the number of steps until the training dies."""
    steps: list[int] = []
    for model in (ImageClassifier, MaskedPretraining):
        forward = model.forward

        def counted(self: Any, inputs: Any, *args: Any, original: Any = forward) -> Any:
            if self.training and steps and isinstance(inputs, list):
                steps[0] -= 1
                if steps[0] < 0:
                    raise Killed
            return original(self, inputs, *args)

        monkeypatch.setattr(model, "forward", counted)
    return steps


@pytest.mark.parametrize("task", ["classification", "pretraining"])
def test_a_killed_run_resumes_bit_for_bit(
    task: str, crops: Path, tmp_path: Path, killing: list[int]
) -> None:
    """With mixing, erasing, dropped paths, random masks, averaged weights and autocast."""
    opts = [
        *(*NARROW, "schedule.iterations=6", "schedule.warmup_iterations=1"),
        *("train.checkpoint_period=2", "train.eval_period=3", "train.ema_decay=0.9"),
        *("train.precision=bf16", "train.log_iterations=1", "train.pictures=0"),
    ]
    config, data = PRETRAINING, folders(crops, "unlabeled")
    if task == "classification":
        config, data = CLASSIFIER, folders(crops)
        opts += [
            *("model.mixup=0.8", "model.cutmix=1.0", "model.erasing=0.5"),
            *("model.label_smoothing=0.1", "model.backbone.drop_path_rate=0.3"),
        ]
    train(config, tmp_path / "whole", data, *opts)
    killing.append(5)
    with pytest.raises(Killed):
        train(config, tmp_path / "torn", data, *opts)
    killing.clear()
    assert not (tmp_path / "torn/model_final.pth").exists()
    train(config, tmp_path / "torn", data, *opts, resume=True)
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    assert len({row["total_loss"] for row in lines(tmp_path / "whole")}) == 6
    for name in ("model_final.pth", "model_ema.pth"):
        torn, whole = (
            torch.load(tmp_path / run / name, weights_only=True)["model"]
            for run in ("torn", "whole")
        )
        assert all(torch.equal(torn[k], tensor) for k, tensor in whole.items()), name


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_recipe_trains_a_step_and_evaluates(path: Path, crops: Path, tmp_path: Path) -> None:
    classifies = path.parent.name.endswith("Classification")
    depths = "[2]" if "_iso_" in path.stem else "[1,1,1,1]"
    opts = ["model.backbone.embed_dim=8", f"model.backbone.depths={depths}", "train.pictures=0"]
    opts += ["schedule.epochs=null"] if "nano" not in path.stem else []
    results = train(
        path,
        tmp_path,
        folders(crops, "class" if classifies else "unlabeled"),
        *opts,
        "schedule.iterations=1",
    )
    (line,) = lines(tmp_path)
    assert 0.2 < line["total_loss"] < 10
    if classifies:
        assert 0 <= results["val"]["classification"]["top1"] <= 100
    else:
        assert results["val"]["masked_images"]["L1"] > 0.1
    shutil.rmtree(tmp_path)


def test_damaged_images_follow_the_policy(
    crops: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Corrupt: skipped in training, refused in evaluation. Grey and CMYK: converted."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("a", "b", "empty"):
            (root / split / name).mkdir(parents=True)
        for name, mode in (("a", "L"), ("b", "CMYK")):
            Image.new(mode, (40, 40), 90 if mode == "L" else (0, 90, 200, 30)).save(
                root / split / name / "1.jpg"
            )
            noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / split / name / "2.jpg")
    (root / "train/a/corrupt.jpg").write_bytes((root / "train/a/1.jpg").read_bytes()[:300])
    opts = [*NARROW, "schedule.iterations=8", "schedule.warmup_iterations=0", "train.pictures=2"]
    with caplog.at_level(logging.INFO, logger="focalnet_det"):
        results = train(CLASSIFIER, tmp_path / "run", folders(root), *opts)
    table = next(r.getMessage() for r in caplog.records if "images and labels" in r.getMessage())
    counts = {line.rsplit(None, 2)[0].strip(): line.split()[-2:] for line in table.splitlines()}
    assert counts["unreadable image"][0] == "skipped"
    assert counts["image not in RGB"][0] == "repaired"
    assert counts["class without images"] == ["kept", "1"]
    metrics = results["val"]["classification"]
    assert np.isnan(metrics["top1-empty"])
    assert np.isfinite(metrics["mean_top1"])
    shutil.copy(root / "train/a/corrupt.jpg", root / "val/a/corrupt.jpg")
    with pytest.raises(ValueError, match=r"files that cannot be read: .*corrupt\.jpg"):
        train(CLASSIFIER, tmp_path / "second", folders(root), *opts)


@pytest.mark.parametrize("task", ["classification", "pretraining"])
def test_two_commands_lead_from_pretraining_to_a_detector(
    task: str, crops: Path, tmp_path: Path
) -> None:
    """A recipe for detection reads the checkpoint as it is, and grows its kernels."""
    config, data = PRETRAINING, folders(crops, "unlabeled")
    if task == "classification":
        config, data = CLASSIFIER, folders(crops)
    train(config, tmp_path, data, "schedule.iterations=1", "train.pictures=0")
    pretrained = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    detector = read(DETECTOR).model()
    report = load_initial_weights(detector, tmp_path / "model_final.pth")
    assert report.share == 1
    rules = {"classifier"} if task == "classification" else {
        "classifier", "token of masked image modeling", "decoder of masked image modeling",
    }  # fmt: skip
    assert set(report.rules.values()) == rules
    assert all("focal_layers" in name for name in report.resized)
    assert all(name.startswith("norm") for name in report.missing)
    bottom_up: dict[str, Tensor] = detector.backbone.bottom_up.state_dict()
    for name, tensor in pretrained.items():
        if name in report.loaded:
            assert torch.equal(bottom_up[name], tensor), name


def test_options_that_do_not_fit_are_refused(crops: Path, tmp_path: Path) -> None:
    cases = [
        (CLASSIFIER, folders(crops, "unlabeled"), (), "need|for pretraining"),
        (PRETRAINING, folders(crops), (), "need a classifier"),
        (CLASSIFIER, {**folders(crops), **folders(crops, "unlabeled")}, (), "one kind of data"),
        (CLASSIFIER, folders(crops), ("model.mixup=0.8", "dataloader.train.batch_size=5"), "even"),
        (CLASSIFIER, folders(crops), ("train.keep_best=classification/mIoU",), "not a metric"),
        (
            CLASSIFIER,
            folders(crops),
            ("model.label_smoothing=2",),
            "label_smoothing must be between 0 and 1",
        ),
    ]
    for config, data, opts, error in cases:
        with pytest.raises(ValueError, match=error):
            train(config, tmp_path / "refused", data, *opts)
        assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="need a classifier"):
        run(RunArguments(config_file=str(DETECTOR), **folders(crops)))
