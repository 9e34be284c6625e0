"""Folders of images and label maps from the command line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog

from focalnet_det.data.io.labels import LabelRule
from focalnet_det.engine.main import RunArguments, run
from focalnet_det.experiment import Experiment, describe
from tests.helpers.paths import ROOT, TOOLS
from tests.helpers.processes import run_program

ADE = ROOT / "configs/ADE20K-SemanticSegmentation"
PUBLISHED = ADE / "upernet_focalnet_tiny_srf_160k.py"
NANO = ADE / "upernet_focalnet_nano_small.py"
YACS = PUBLISHED.with_suffix(".yaml")
# Thin and small; one iteration.
THIN = [
    *("model.backbone.embed_dim=8", "model.backbone.depths=[1,1,1,1]", "model.channels=16"),
    *("model.train_size=[64,64]", "dataloader.train.batch_size=2", "schedule.iterations=1"),
    *("dataloader.train.augmentations.crop=64", "dataloader.train.num_workers=0"),
    *("dataloader.train.augmentations.short_side=96", "dataloader.test.0.num_workers=0"),
    *("dataloader.test.0.augmentations.short_side=96", "train.device=cpu"),
]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Four images of three classes, numbered from 1, and their class list."""
    for name in "abcd":
        for kind, values in (
            ("images", np.zeros((40, 60, 3), dtype=np.uint8)),
            ("labels", np.full((40, 60), 1 + ord(name) % 3, dtype=np.uint8)),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / kind / f"{name}.png")
    (tmp_path / "classes.txt").write_text("road\nsky\ncar\n")
    return tmp_path


def described(config: Path, folder: Path, *opts: str, **changes: Any) -> Experiment:
    images, labels = [str(folder / "images")], [str(folder / "labels")]
    fields = {"sem_images": images, "sem_labels": labels, "first_label": 1}
    fields |= {"val_sem_images": images, "val_sem_labels": labels}
    fields |= {"classes": str(folder / "classes.txt"), "output": str(folder / "run")}
    return describe(RunArguments(config_file=str(config), opts=list(opts), **(fields | changes)))


def test_published_recipe_on_folders(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        experiment = described(PUBLISHED, folders)
    settings = experiment.settings
    assert (settings.model.classes, settings.train_sets) == (3, ("labels_train",))
    assert list(experiment.test_loaders) == ["labels_val"]
    records = DatasetCatalog.get("labels_train")
    assert [Path(r["file_name"]).name for r in records] == ["a.png", "b.png", "c.png", "d.png"]
    assert records[0]["label_rule"] == LabelRule(num_classes=3, first_label=1)
    assert MetadataCatalog.get("labels_val").stuff_classes == ["road", "sky", "car"]
    # 4 images: a batch of 4 for 16, a quarter of the rate, and the least number of iterations.
    assert (settings.batch_size, settings.learning_rate) == (4, 1.5e-5)
    assert experiment.schedule.max_iter(1) == 1000
    assert "4 training images in batches of 4" in caplog.text


@pytest.mark.parametrize(
    ("config", "key", "none"),
    [
        (NANO, "model.loss.class_weights", "null"),
        (YACS, "MODEL.UPERNET.CLASS_WEIGHTS", "()"),
    ],
)
def test_few_images_balance_the_classes(
    config: Path, key: str, none: str, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the four images two are sky, one is road and one car."""
    with caplog.at_level("INFO"):
        experiment = described(config, folders)
    assert experiment.settings.model.class_weights == (1.0, 0.71, 1.0)
    loss = experiment.model().sem_seg_head.loss
    assert loss.class_weights.tolist() == pytest.approx([1.0, 0.71, 1.0])
    assert "from 0.71 (sky) to 1 (road)" in caplog.text
    assert f"For equal weights: {key}" in caplog.text
    model = described(config, folders, f"{key}={none}").settings.model
    assert model.class_weights is None
    model = described(config, folders, f"{key}=[1,2,3]").settings.model
    assert model.class_weights == (1, 2, 3)


def test_what_has_no_weights_gets_none(folders: Path) -> None:
    leaf = ADE / "semantic_fpn_focalnet_tiny_srf_160k.py"
    assert described(leaf, folders).settings.model.class_weights is None
    nothing: dict[str, Any] = {"sem_images": [], "sem_labels": [], "eval_only": True}
    assert described(NANO, folders, **nothing).settings.model.class_weights is None


def test_yacs_config_is_pointed_at_folders(folders: Path) -> None:
    experiment = described(YACS, folders)
    assert experiment.model().sem_seg_head.num_classes == 3
    assert experiment.settings.train_sets == ("labels_train",)
    assert list(experiment.test_loaders) == ["labels_val"]


def test_several_pairs_and_evaluation_alone(folders: Path) -> None:
    twice = {"sem_images": [str(folders / "images")] * 2}
    twice |= {"sem_labels": [str(folders / "labels")] * 2}
    twice |= {"val_sem_images": [], "val_sem_labels": []}
    experiment = described(NANO, folders, **twice)
    assert experiment.settings.train_sets == ("labels_train", "labels_train_2")
    assert experiment.test_loaders == {}
    nothing: dict[str, Any] = {"sem_images": [], "sem_labels": []}
    experiment = described(NANO, folders, eval_only=True, **nothing)
    assert list(experiment.test_loaders) == ["labels_val"]
    with pytest.raises(ValueError, match="there is no training set"):
        described(NANO, folders, **nothing)


def test_bad_folders(folders: Path) -> None:
    with pytest.raises(ValueError, match="--sem-images DIR needs --sem-labels.*1 image.*0 label"):
        described(NANO, folders, sem_labels=[])
    with pytest.raises(ValueError, match="need --classes FILE"):
        described(NANO, folders, classes=None, first_label=None)
    with pytest.raises(FileNotFoundError, match="No such folder.*absent"):
        described(NANO, folders, sem_images=["absent"])
    detector = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
    with pytest.raises(ValueError, match="need a semantic segmentor"):
        described(detector, folders)


@pytest.mark.slow
def test_a_shifted_class_list_stops_the_training(folders: Path, tmp_path: Path) -> None:
    fields = {"sem_images": [str(folders / "images")], "sem_labels": [str(folders / "labels")]}
    fields |= {"classes": str(folders / "classes.txt"), "output": str(tmp_path / "run")}
    # All four images in the first batch: only one of them has the last class.
    opts = [*THIN, "dataloader.train.batch_size=4"]
    with pytest.raises(ValueError, match=r"contains 3, classes are 0 to 2.*--first-label"):
        run(RunArguments(config_file=str(NANO), opts=opts, **fields))


@pytest.mark.slow
def test_two_processes_share_batch_norm(folders: Path, tmp_path: Path) -> None:
    command = ["--num-cpus", "2", "--config-file", str(NANO), "--output", str(tmp_path / "two")]
    command += ["--sem-images", str(folders / "images"), "--sem-labels", str(folders / "labels")]
    command += ["--val-sem-images", str(folders / "images")]
    command += ["--val-sem-labels", str(folders / "labels"), "--first-label", "1"]
    command += ["--classes", str(folders / "classes.txt"), *THIN]
    # One image a process: its own batch norm would have nothing to normalise over.
    done = run_program(TOOLS / "train_net.py", *command, forks=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Semantic segmentation, 4 images" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ade20k_mini", "camvid"])
def test_150_classes_on_real_images(name: str, shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / name
    labels = root / ("annotations" if name == "ade20k_mini" else "annotations_ade150")
    fields = {
        "sem_images": [str(root / "images/training")],
        "sem_labels": [str(labels / "training")],
        "val_sem_images": [str(root / "images/validation")],
        "val_sem_labels": [str(labels / "validation")],
        "classes": str(shared_data / "ade20k_mini/objectInfo150.txt"),
    }
    args = RunArguments(config_file=str(PUBLISHED), opts=THIN, output=str(tmp_path), **fields)
    metrics = run(args)["validation"]["sem_seg"]
    ious = [value for key, value in metrics.items() if key.startswith("IoU-")]
    assert len(ious) == 150
    # The classes of the data sheet that occur in the validation images.
    assert sum(value == value for value in ious) == (8 if name == "ade20k_mini" else 11)
