"""Launching: arguments are checked first, and what goes wrong in two processes is one line."""

import os
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.utils import comm

from focalnet_det.engine import agreement
from focalnet_det.engine.agreement import check_agreement, library_versions
from focalnet_det.engine.launch import after_restart, launch_run
from focalnet_det.engine.main import RunArguments
from focalnet_det.experiment.arguments import check_arguments
from tests.helpers.paths import ROOT, TOOLS
from tests.helpers.processes import Program

NANO = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
ARGUMENTS = RunArguments(config_file="missing.py")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_machines": 2, "machine_rank": 5}, "--machine-rank 5 is out of range"),
        ({"machine_rank": -1}, "--machine-rank -1 is out of range"),
        ({"num_gpus": -2}, "--num-gpus -2, .* cannot be negative"),
        ({"num_cpus": -1}, "--num-cpus -1, .* cannot be negative"),
        ({"num_machines": 0}, "--num-machines 0: .* at least one machine"),
        ({"num_machines": 2}, "Multi-machine training requires --dist-url tcp://HOST:PORT"),
        ({"num_gpus": 2, "num_cpus": 2}, "--num-gpus and --num-cpus are mutually exclusive"),
        ({"num_gpus": 99}, "--num-gpus 99, but PyTorch finds"),
        ({"num_cpus": 2, "dist_url": "here"}, "--dist-url here does not have the form tcp://HOST"),
        ({"num_cpus": 2, "dist_url": "tcp://a:99999"}, "--dist-url tcp://a:99999 does not have"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch_run(replace(ARGUMENTS, **changes))


def test_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        url = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        two = replace(ARGUMENTS, num_cpus=2, num_gpus=0, dist_url=url)
        with pytest.raises(ValueError, match=f"--dist-url {url}: the port is in use"):
            launch_run(two)
        # The port is on the first machine; here it does not matter.
        with pytest.raises(ValueError, match="ranks are 0 to|PyTorch finds|--machine-rank 2"):
            launch_run(replace(two, num_machines=2, machine_rank=2))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"RANK=\(missing\), WORLD_SIZE=\(missing\)"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK=first"),
        ({"MASTER_ADDR": None}, r"but MASTER_ADDR=\(missing\). Start it with torchrun"),
    ],
)
def test_variables_of_torchrun(
    variables: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    whole = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    whole |= {"MASTER_PORT": "1", "MASTER_ADDR": "localhost"}
    for name in whole:
        monkeypatch.delenv(name, raising=False)
    for name, value in (whole | variables if variables else {}).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        launch_run(ARGUMENTS)


def test_after_a_restart_nothing_is_deleted_or_refused() -> None:
    trained = after_restart(replace(ARGUMENTS, overwrite=True))
    assert (trained.resume, trained.overwrite) == (True, False)
    evaluated = after_restart(replace(ARGUMENTS, eval_only=True))
    for arguments in (trained, evaluated):
        check_arguments(arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resume": True, "overwrite": True}, "--overwrite deletes the run that --resume"),
        ({"eval_only": True, "overwrite": True}, "--overwrite has no effect with --eval-only"),
        ({"eval_only": True, "resume": True}, "--eval-only and --resume contradict each other"),
    ],
)
def test_options_that_contradict_each_other(fields: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(replace(ARGUMENTS, **fields))


@pytest.mark.parametrize(
    ("others", "difference"),
    [
        ([{"config": "a\n  lr: 1\nb"}], None),
        ([{"config": "a\n  lr: 2\nb"}], "config ('lr: 1' in process 0, 'lr: 2' in process 1)"),
        ([{"config": "a\n  lr: 1\nb"}, {"config": "a\n  lr: 1"}],
         "config ('b' in process 0, 'nothing' in process 2)"),
        ([{"config": "a\n  lr: 1\nb", "data": "8"}],
         "data ('nothing' in process 0, '8' in process 1)"),
        ([{"config": "c", "data": "8"}],
         "config ('a' in process 0, 'c' in process 1); data ('nothing' in process 0"),
    ],
)  # fmt: skip
def test_agreement(
    others: list[dict[str, str]], difference: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "all_gather", lambda facts: [facts, *others])
    facts = {"config": "a\n  lr: 1\nb"}
    if difference is None:
        check_agreement(facts)
    else:
        with pytest.raises(ValueError, match=re.escape(f"of this job differ in {difference}")):
            check_agreement(facts)


def test_versions_that_count() -> None:
    versions = library_versions()
    assert versions["the version of torch"] == torch.__version__
    for name in ("Python", "torchvision", "detectron2", "focalnet_det"):
        assert versions[f"the version of {name}"]
    assert agreement.MISSING not in versions.values()


def start(
    shapes: Path, output: Path, *arguments: str, images: Path | None = None, **options: Any
) -> Program:
    """The tool with few, small images; `options` replace default overrides."""
    overrides = {
        "schedule.iterations": 1000,
        "dataloader.train.batch_size": 2,
        "dataloader.train.num_workers": 1,
        "dataloader.train.augmentations.crop": 64,
        "train.eval_period": 0,
    } | options
    words = ["--config-file", NANO, "--output", output, *arguments]
    words += ["--coco-json", shapes / "annotations/instances_train.json"]
    words += ["--images", images or shapes / "images/train"]
    words += [f"{key}={value}" for key, value in overrides.items()]
    return Program(TOOLS / "train_net.py", *words)


def children(pid: int) -> list[int]:
    """Spawned processes of a process, in the order of their start."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in found}
    return [pid for pid, command in commands.items() if "spawn_main" in command]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_killed_process_ends_the_job(shapes: Path, tmp_path: Path) -> None:
    job = start(shapes, tmp_path, "--num-cpus", "2")
    while job.poll() is None and "/1000" not in job.text()[0]:
        time.sleep(0.05)
    # Gloo connections break in the other one: it must not be what is shown.
    os.kill(children(job.pid)[1], signal.SIGKILL)
    before = time.monotonic()
    _, errors = job.communicate(timeout=120)
    assert time.monotonic() - before < 60
    assert job.returncode == 137
    assert errors == (
        "error: process 1 of 2 was killed by SIGKILL: out of memory? The job has ended; continue a "
        "training with --resume.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_data_error_is_one_line(processes: int, shapes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (shapes / "images/train").iterdir():
        (images / path.name).write_bytes(b"no image")
    several = ["--num-cpus", "2"] if processes == 2 else []
    job = start(shapes, tmp_path / "o", *several, images=images)
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 1
    (line,) = errors.splitlines()
    assert re.match(
        r"error: (process [01] of 2: )?The images of .*instances_train\.json cannot", line
    )
    # Three files and the known formats are named.
    assert len(line) < 900
    for word in ("Traceback", "DataLoader", "Caught"):
        assert word not in line
    # It is found before the run touches its folder.
    assert not (tmp_path / "o").exists()
