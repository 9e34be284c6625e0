"""The config that a run saves is given back, and makes the same run, its data included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.main import RunArguments, run
from focalnet_det.experiment import check, describe
from tests.helpers.paths import CONFIGS

ADE = CONFIGS / "ADE20K-SemanticSegmentation"
MASK_RCNN = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
MASK_RCNN_YAML = MASK_RCNN.with_name("mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml")
LAZY = [
    *("dataloader.train.num_workers=0", "dataloader.train.batch_size=2"),
    *("dataloader.train.augmentations.short_sides=[64]", "dataloader.train.augmentations.crop=64"),
    *("dataloader.test.0.num_workers=0", "dataloader.test.0.augmentations.short_side=64"),
    *("train.seed=4", "train.device=cpu", "train.pictures=0", "schedule.iterations=2"),
]
YACS = [
    *("MODEL.FOCALNET.VARIANT=focalnet_nano", "MODEL.FOCALNET.EMBED_DIM=8"),
    *("MODEL.FPN.OUT_CHANNELS=16", "MODEL.ROI_BOX_HEAD.FC_DIM=16", "MODEL.DEVICE=cpu"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM=16", "SOLVER.IMS_PER_BATCH=2", "SOLVER.MAX_ITER=2"),
    *("SOLVER.PRECISION=fp32", "INPUT.MIN_SIZE_TRAIN=(64,)", "INPUT.MIN_SIZE_TEST=64"),
    *("DATALOADER.NUM_WORKERS=0", "SEED=4", "TEST.PICTURES=0", "INPUT.POLICY=resize"),
]


def own_files(shapes: Path) -> dict[str, Any]:
    return {
        "coco_json": [str(shapes / "annotations/instances_train.json")],
        "images": [str(shapes / "images/train")],
        "val_json": [str(shapes / "annotations/instances_val.json")],
        "val_images": [str(shapes / "images/val")],
    }


@pytest.mark.parametrize(
    ("config", "opts"), [(MASK_RCNN, LAZY), (MASK_RCNN_YAML, YACS)], ids=["py", "yaml"]
)
def test_saved_config_alone_repeats_the_run(
    config: Path, opts: list[str], shapes: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    args = RunArguments(config_file=str(config), opts=opts, output=str(first), **own_files(shapes))
    results = run(args)
    again = RunArguments(config_file=str(first / "config.yaml"), output=str(second))
    before, after = check(describe(args)).settings, check(describe(again)).settings
    assert (after.schedule, after.model) == (before.schedule, before.model)
    assert (after.train_sets, after.test_sets) == (before.train_sets, before.test_sets)
    assert (after.batch_size, after.learning_rate) == (before.batch_size, before.learning_rate)
    options = [{**vars(found.options), "output_dir": ""} for found in (before, after)]
    assert options[0] == options[1]
    assert json.dumps(run(again)) == json.dumps(results)
    weights = [
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (first, second)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0)
    lines = [
        [json.loads(line) for line in (folder / "metrics.json").open()][:2]
        for folder in (first, second)
    ]
    for one, two in zip(*lines, strict=True):
        assert {k: v for k, v in one.items() if "loss" in k} == {
            k: v for k, v in two.items() if "loss" in k
        }


def test_overrides_of_a_saved_config(shapes: Path, tmp_path: Path) -> None:
    args = RunArguments(config_file=str(MASK_RCNN), opts=LAZY, **own_files(shapes))
    saved = tmp_path / "config.yaml"
    saved.write_text(describe(args).config_text)
    changed = describe(
        RunArguments(config_file=str(saved), opts=["schedule.iterations=9", "optimizer.lr=0.5"])
    )
    assert (changed.schedule.iterations, changed.settings.learning_rate) == (9, 0.5)
    assert changed.settings.train_sets == ("instances_train",)


def test_label_folders_are_saved_too(shapes: Path, tmp_path: Path) -> None:
    ade = shapes / "ade"
    args = RunArguments(
        config_file=str(ADE / "upernet_focalnet_tiny_srf_160k.yaml"),
        sem_images=[str(ade / "images/training")],
        sem_labels=[str(ade / "annotations/training")],
        classes=str(tmp_path / "classes.txt"),
        first_label=1,
    )
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    experiment = describe(args)
    (tmp_path / "config.yaml").write_text(experiment.config_text)
    again = describe(RunArguments(config_file=str(tmp_path / "config.yaml")))
    assert again.settings == experiment.settings
    assert again.settings.own_data.first_label == 1
    assert len(again.settings.model.class_weights) == 10
    assert again.config_text == experiment.config_text
