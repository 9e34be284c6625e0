"""Length, batch and rate for one's own data, worked out by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.experiment import Experiment, RunArguments, describe
from focalnet_det.experiment.length import training_length
from focalnet_det.experiment.own_data import set_name
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs/COCO-InstanceSegmentation"
SMALL = CONFIGS / "mask_rcnn_focalnet_nano_fpn_small.py"
PUBLISHED = CONFIGS / "mask_rcnn_focalnet_tiny_srf_fpn_1x"


@pytest.mark.parametrize(
    ("images", "batch", "expected"),
    [
        (165, 4, (4, 2520)),  # 42 iterations an epoch, 60 epochs
        (8, 4, (4, 1000)),  # 60 epochs would be 120
        (3, 16, (3, 1000)),
        (20_000, 4, (4, 90_000)),  # 60 epochs would be 300,000
        (117_266, 4, (4, 351_804)),  # 12 epochs of 29,317
    ],
)
def test_training_length(images: int, batch: int, expected: tuple[int, int]) -> None:
    found = training_length(images, batch)
    assert (found.batch_size, found.iterations) == expected
    assert f"{images} training images" in found.reason
    assert ("larger than the data set" in found.reason) == (images < batch)


def data(folder: Path, images: int) -> Path:
    """A COCO file with a box in every image but one, and its images."""
    path = folder / "train.json"
    box = {"category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 9, "width": 9} for i in range(images)
        ],
        "annotations": [{**box, "id": i, "image_id": i} for i in range(1, images)],
        "categories": [{"id": 1, "name": "cell"}],
    }
    path.write_text(json.dumps(content))
    for i in range(images):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.png")
    return path


def described(config: Path, folder: Path, images: int, *opts: str) -> Experiment:
    args = RunArguments(config_file=str(config), opts=list(opts), output=str(folder / "run"))
    args.coco_json, args.images = [str(data(folder, images=images))], [str(folder)]
    return describe(args)


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_published_recipe_on_few_images(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        experiment = described(PUBLISHED.with_suffix(suffix), tmp_path, 9)
    schedule, settings = experiment.schedule, experiment.settings
    # 8 annotated images: a batch of 8 for 16, half the rate, the drops at 9/12 and 11/12.
    assert schedule.max_iter(1) == 1000
    assert schedule.milestones == (750, 917)
    assert schedule.warmup_iterations == 100
    assert (settings.learning_rate, settings.batch_size) == (5e-5, 8)
    assert "8 training images in batches of 8: 1000 iterations" in caplog.text
    assert "learning rate 5e-05" in caplog.text
    # A twelfth of 1,000 iterations, as an epoch is a twelfth of the recipe; not each iteration.
    options = experiment.options
    assert (options.eval_period, options.checkpoint_period) == (84, 84)
    assert options.period_unit == "iterations"


def test_periods_that_were_given_stay(tmp_path: Path) -> None:
    options = described(SMALL, tmp_path, 9, "train.eval_period=70").options
    assert (options.eval_period, options.period_unit) == (70, "iterations")
    options = described(SMALL, tmp_path, 9, "train.eval_period=0").options
    # A checkpoint each 500 of the recipe's 3,000 iterations is one each 167 of 1,000.
    assert (options.eval_period, options.checkpoint_period) == (0, 167)


def test_a_length_that_was_given_stays(tmp_path: Path) -> None:
    settings = described(SMALL, tmp_path, 3, "schedule.iterations=77").settings
    assert (settings.schedule.iterations, settings.batch_size) == (77, 4)


def test_a_batch_that_was_given_stays(tmp_path: Path) -> None:
    settings = described(SMALL, tmp_path, 3, "dataloader.train.batch_size=6").settings
    assert settings.batch_size == 6
    assert settings.schedule.iterations == 1000


def test_processes_share_a_small_batch_evenly() -> None:
    """Seven images for three processes: two each."""
    assert training_length(7, 16, 3).batch_size == 6
    assert training_length(2, 16, 3).batch_size == 3


def test_a_rate_that_was_given_stays(tmp_path: Path) -> None:
    settings = described(SMALL, tmp_path, 3, "optimizer.lr=0.25").settings
    assert (settings.batch_size, settings.learning_rate) == (2, 0.25)


@pytest.mark.parametrize(
    ("path", "split", "taken", "expected"),
    [
        ("a/instances_val.json", "val", (), "instances_val"),
        ("a/instances_val2017.json", "val", (), "instances_val2017"),
        ("a/instances_train.json", "val", (), "instances_train_val"),
        ("a/train.json", "train", (), "train"),
        ("a/trains.json", "train", (), "trains_train"),
        ("a/cells.json", "train", (), "cells_train"),
        ("a/cells.json", "train", ("cells_train",), "cells_train_2"),
        ("a/val.json", "val", ("val",), "val_val"),
        # The name of a set that was there before is not taken away from it.
        ("a/coco_2017_val.json", "val", (), "coco_2017_val_2"),
    ],
)
def test_names_are_readable(path: str, split: str, taken: tuple[str, ...], expected: str) -> None:
    assert set_name(path, split, set(taken)) == expected
