"""The start of a run, from the command line: what is said, and the record that it leaves."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import CONFIGS, TOOLS
from tests.helpers.processes import run_program

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

TINY = "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py"
NANO = "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
LABELS = "ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py"


def start(output: Path, config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start an evaluation, which ends at once, as no weights are named."""
    words = ["--eval-only", "--output", output, "--config-file", CONFIGS / config]
    return run_program(TOOLS / "train_net.py", *words, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear rule", "length", "class weights"])
def test_what_is_decided_early_is_seen_and_logged(case: str, shapes: Path, tmp_path: Path) -> None:
    coco = "--coco-json", str(shapes / "annotations/instances_train.json"), "--images"
    folders = ["--sem-images", str(tmp_path / "i"), "--sem-labels", str(tmp_path / "l")]
    classes = tmp_path / "classes.txt"
    classes.write_text("road\nsky\n")
    for kind in "il":
        (tmp_path / kind).mkdir()
        pixels = np.full((40, 60, *([3] if kind == "i" else [])), 1, np.uint8)
        pixels[:10] = 2
        Image.fromarray(pixels).save(tmp_path / kind / "a.png")
    config, arguments, line = {
        "linear rule": (
            TINY,
            [*coco, str(shapes / "images/train"), "dataloader.train.batch_size=2"],
            "The batch size is 2 instead of the recipe's 16: the learning rate is scaled by "
            "0.125 to 1.25e-05.",
        ),
        "length": (NANO, [*coco, str(shapes / "images/train")], "8 training images in batches of"),
        "class weights": (
            LABELS,
            [*folders, "--classes", str(classes), "--first-label", "1"],
            # Of the pixels 3/4 and 1/4: roots of 1/(2 * 3/4) and 1/(2 * 1/4).
            "from 0.82 (road) to 1.41 (sky)",
        ),
    }[case]
    output = tmp_path / "o"
    output.mkdir()
    for name in ("config.yaml", "environment.txt"):
        (output / name).write_text("of a training")
    result = start(output, config, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: --eval-only requires weights. ")
    assert result.stdout.count(line) == 1
    log = (output / "log.txt").read_text()
    assert log.count(line) == 1
    # The traceback is for the file alone.
    assert "Traceback" in log
    assert "Traceback" not in result.stdout + result.stderr
    # The record of the training that lies there stays.
    for name in ("config.yaml", "environment.txt"):
        assert (output / name).read_text() == "of a training"
    assert "train:" in (output / "evaluation/config.yaml").read_text()
    record = (output / "evaluation/environment.txt").read_text()
    for part in ("--eval-only", "started: 20", "seed: ", "deterministic algorithms: off", "git: "):
        assert record.count(part) == 1


def test_starts_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from focalnet_det.engine.run import append_start

    for number in (1, 2):
        monkeypatch.setattr(sys, "argv", ["train_net.py", f"--number {number}"])
        append_start(tmp_path / "environment.txt", seed=number - 2)
    text = (tmp_path / "environment.txt").read_text()
    assert text.index("'--number 1'") < text.index("seed: random") < text.index("'--number 2'")
    assert text.count("started: ") == 2
    assert "seed: 0\n" in text


def test_each_process_leaves_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    from types import SimpleNamespace

    import torch
    from detectron2.utils import comm

    from focalnet_det.engine.hooks import ProfilerHook

    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        hook = ProfilerHook(tmp_path, 0, 0)
        hook.trainer = SimpleNamespace(iter=0, max_iter=1)
        hook.before_step()
        with torch.profiler.record_function(f"work of {rank}"):
            torch.zeros(3).sum()
        hook.after_step()
    names = ["profile.json", "profile.rank1.json", "profile.rank1.txt", "profile.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for rank, name in enumerate(("profile.json", "profile.rank1.json")):
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        works = {event["name"] for event in events if "work of" in event.get("name", "")}
        assert works == {f"work of {rank}"}
