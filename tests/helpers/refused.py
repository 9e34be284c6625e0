"""Command lines with small data, and the one line that refuses them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from focalnet_det.errors import one_line_errors
from focalnet_det.experiment import RunArguments, check, describe
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"

NANO = "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"

FOCAL_NANO = "Shapes-InstanceSegmentation/mask_rcnn_focal_nano_fpn_small.py"

BOXES = "COCO-Detection/retinanet_focalnet_nano_fpn_small.py"

ONE_X = "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py"

YAML = "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml"

RETINANET_YAML = "COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.yaml"

UPERNET = "ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py"

UPERNET_YAML = "ADE20K-SemanticSegmentation/upernet_focalnet_tiny_srf_160k.yaml"

PANOPTIC = "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py"

BACKBONE = "model.backbone.bottom_up"


def data_of(config: str, files: Path) -> dict[str, Any]:
    """Options that name the data of a kind that a config takes."""
    train, val = [str(files / "train")], [str(files / "val")]
    if "upernet" in config:
        labels = {"sem_images": train, "sem_labels": [str(files / "train_labels")]}
        val_labels = {"val_sem_images": val, "val_sem_labels": [str(files / "val_labels")]}
        return {**labels, **val_labels, "classes": str(files / "classes.txt")}
    kind = "panoptic" if "panoptic" in config else "coco"
    stem = "panoptic_" if kind == "panoptic" else ""
    name = "panoptic_json" if kind == "panoptic" else "json"
    train_option = "panoptic_json" if kind == "panoptic" else "coco_json"
    return {
        train_option: [str(files / f"{stem}train.json")],
        "images": train,
        f"val_{name}": [str(files / f"{stem}val.json")],
        "val_images": val,
    }


def error_of(args: RunArguments, capsys: pytest.CaptureFixture[str]) -> str:
    """What a tool prints for a command line that must be refused; one line, exit status 1."""
    with pytest.raises(SystemExit) as refused, one_line_errors():
        check(describe(args), eval_only=args.eval_only)
    assert refused.value.code == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.startswith("error: ")
    return text


def error(
    config: str,
    opts: Sequence[str],
    files: Path,
    capsys: pytest.CaptureFixture[str],
    **changes: Any,
) -> str:
    fields = {**data_of(config, files), "output": str(files / "run"), **changes}
    fields = {k: v for k, v in fields.items() if v is not None}
    return error_of(
        RunArguments(config_file=str(CONFIGS / config), opts=list(opts), **fields), capsys
    )
