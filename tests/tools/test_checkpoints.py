"""The two tools for checkpoints, as people run them."""

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from focalnet_det import create_backbone
from focalnet_det.checkpoint import read_state_dict, write_state_dict
from tests.helpers.paths import TOOLS
from tests.helpers.processes import run_program


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program(TOOLS / tool, *arguments)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    net = create_backbone("focalnet_nano", output_norm=False, focal_windows=(9, 9, 9, 9))
    torch.save({"model": net.half().state_dict(), "epoch": 299}, path)
    return path


def test_inspect(weights: Path) -> None:
    done = run("inspect_checkpoint.py", weights)
    assert done.returncode == 0
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert lines["variant"].strip() == "focalnet_nano"
    assert lines["differs in"].strip() == "focal_windows=(9, 9, 9, 9)"
    assert lines["layout"].strip() == "official classification"
    assert lines["precision"].strip() == "float16"
    assert lines["training"].strip() == "epoch 299"
    found = json.loads(run("inspect_checkpoint.py", weights, "--json").stdout)
    assert found["shapes"]["focal_levels"] == [2, 2, 2, 2]


def test_convert_there_and_back(weights: Path, tmp_path: Path) -> None:
    there = run(
        "convert_checkpoint.py", weights, "--to", "timm", "--output", tmp_path / "t.safetensors"
    )
    # 4 of the stem, 16 in each of 6 blocks, 4 in each of 3 downsamplings.
    assert there.stdout.startswith("Converted 112 tensors from official classification names.")
    back = run(
        "convert_checkpoint.py",
        tmp_path / "t.safetensors",
        "--to",
        "official",
        "--output",
        tmp_path / "back.pth",
    )
    assert back.returncode == 0
    expected, actual = read_state_dict(weights), read_state_dict(tmp_path / "back.pth")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[n], t) for n, t in expected.items())


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect_checkpoint.py", ["absent.pth"], "error: No such checkpoint: absent.pth."),
        (
            "convert_checkpoint.py",
            ["absent.pth", "--to", "timm", "--output", "x.pth"],
            "error: No such checkpoint: absent.pth.",
        ),
    ],
)
def test_one_line_for_bad_input(tool: str, arguments: list[str], message: str) -> None:
    done = run(tool, *arguments)
    assert (done.returncode, done.stderr.strip()) == (1, message)


def test_inspect_unknown_files(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "resnet.safetensors", {"conv1.weight": torch.ones(64, 3, 7, 7)})
    done = run("inspect_checkpoint.py", tmp_path / "resnet.safetensors")
    assert "layout:                 unknown" in done.stdout
    assert "1 of 1 names differ, first conv1.weight" in done.stdout


def test_inspect_a_file_with_objects(weights: Path, tmp_path: Path) -> None:
    """As mmdet 3.x saves it: what is no tensor is left out and listed."""
    state = {f"backbone.{n}": t for n, t in read_state_dict(weights).items()}
    state["roi_head.bbox_head.0.fc_cls.weight"] = torch.ones(81, 4)
    state["roi_head.mask_head.0.conv_logits.weight"] = torch.ones(80, 4, 1, 1)
    meta = {"iter": 7, "args": argparse.Namespace(a=1), "seed": np.int64(3)}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "epoch_1.pth")
    done = run("inspect_checkpoint.py", tmp_path / "epoch_1.pth")
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert lines["this is"].strip() == "a Cascade Mask R-CNN (80 classes, focalnet_nano)"
    assert lines["training"].strip() == "iter 7"
    assert lines["left out, not run"].strip() == "argparse.Namespace"


@pytest.mark.slow
def test_evaluation_of_a_page(tmp_path: Path) -> None:
    """A link to a sign-in page, through the training tool's default options."""
    (tmp_path / "model.pth").write_bytes(b"<!DOCTYPE html><html>Sign in</html>")
    leaf = TOOLS.parent / "configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py"
    done = run(
        "train_net.py",
        "--config-file",
        leaf,
        "--eval-only",
        f"train.init_checkpoint={tmp_path / 'model.pth'}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.device=cpu",
    )
    assert done.returncode == 1
    assert "model.pth: it is an HTML page: download the file itself" in done.stderr
