"""The commands of the README and of the pages are run, on small data with small models."""

import json
import shlex
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("av", reason="PyAV is missing: pip install av")

from focalnet_det.data.shapes.generate import make_shapes
from focalnet_det.predict.video import VideoWriter
from tests.docs.test_pages import DOCS, README, commands, script_of
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_program
from tests.helpers.thin_recipes import BACKBONES, FAMILIES, RUN, SIZES, with_keypoints

SMALL = [
    *("schedule.iterations=1", "train.device=cpu", "dataloader.train.batch_size=2"),
    *("dataloader.train.num_workers=0", "dataloader.test.0.num_workers=0", "train.pictures=1"),
    *("dataloader.test.0.augmentations.short_side=64", "dataloader.train.augmentations.crop=64"),
]
INSTANCES = [*SMALL, "dataloader.train.augmentations.short_sides=[64]"]
# What makes a training short, by a word of its command.
TRAININGS = {
    "mask_rcnn_focalnet_nano": INSTANCES,
    "retinanet_focalnet_nano": INSTANCES,
    "panoptic_fpn_focalnet_nano": INSTANCES,
    "upernet_focalnet_nano": [*SMALL, "dataloader.train.augmentations.short_side=64"],
    "keypoint_rcnn": [*BACKBONES["focalnet"], *RUN, *SIZES, *FAMILIES["keypoint_rcnn"]],
}
# Commands that other tests run, by their beginning.
ELSEWHERE = {
    "focalnet-det export ": "tests/predict/export/test_export_model.py",
    "focalnet-det install-detectron2": "tests/tools/test_install_detectron2.py",
    "focalnet-det --help": "tests/test_command_line.py",
    "focalnet-det train --num-gpus 8 ": "tests/engine/test_recipes.py",
    "focalnet-det evaluate --config-file configs/": "tests/engine/test_recipes.py",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name."""
    root = tmp_path_factory.mktemp("work")
    shapes = make_shapes(root / "shapes", train=4, val=2, size=(96, 80), seed=3, workers=1)
    annotations = shapes / "annotations"
    for part in ("train", "val"):
        for source, target in {
            annotations / f"instances_{part}.json": f"{part}.json",
            annotations / f"panoptic_{part}.json": f"panoptic_{part}.json",
            shapes / f"panoptic_{part}": f"panoptic_{part}",
            shapes / f"images/{part}": f"{part}_images",
        }.items():
            (root / target).symlink_to(source)
        long = {"train": "training", "val": "validation"}[part]
        (root / part).symlink_to(shapes / "ade/images" / long)
        (root / f"{part}_labels").symlink_to(shapes / "ade/annotations" / long)
    names = [c["name"] for c in json.loads((shapes / "categories.json").read_text())]
    (root / "classes.txt").write_text("\n".join(names))
    keypoints = with_keypoints(annotations / "instances_train.json", root)
    shutil.move(keypoints, root / "keypoints.json")
    shutil.copytree(shapes / "images/val", root / "photos")
    with VideoWriter(root / "clip.mp4", Fraction(5)) as video:
        for path in sorted((root / "photos").iterdir()):
            video.add(np.asarray(Image.open(path).convert("RGB")))
    return root


def ours() -> list[str]:
    return [c for c in commands(README, *DOCS) if c.startswith("focalnet-det ")]


def test_other_tests_run_the_rest() -> None:
    for begin, test in ELSEWHERE.items():
        assert (ROOT / test).is_file()
        assert any(command.startswith(begin) for command in ours())


@pytest.mark.slow
def test_commands_run(workspace: Path) -> None:
    """In the order of the pages: later ones use the runs of earlier ones."""
    done = set()
    for command in ours():
        if command.startswith(tuple(ELSEWHERE)):
            continue
        script, arguments = script_of(shlex.split(command))
        small = next((o for word, o in TRAININGS.items() if word in command), [])
        # Two pages may train the same into different folders.
        same = command.split(" --config-file ")[-1]
        if "train_net" in script and same in done:
            continue
        done.add(same)
        ended = run_program(ROOT / script, *arguments, *small, folder=workspace)
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"
    written = {str(p.relative_to(workspace)) for p in workspace.glob("output/*/*")}
    assert {"output/mine/model_final.pth", "output/photos/predictions.json"} <= written
    assert {"output/panoptic/config.yaml", "output/keypoints/config.yaml"} <= written
