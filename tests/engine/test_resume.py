"""Nothing is lost when a training dies: killed and resumed equals never interrupted."""

import copy
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn

from focalnet_det.data.instances.mappers import DATA_ISSUES, SkippedImage
from focalnet_det.data.issue_policies import CROWD, UNREADABLE_IMAGE
from focalnet_det.data.loader import TrainLoader
from focalnet_det.data.stream import StreamDataset, StreamSampler
from focalnet_det.engine.iteration import drop_lines_from
from focalnet_det.engine.trainer import Trainer
from focalnet_det.experiment import TrainOptions
from tests.helpers.paths import ROOT, TOOLS
from tests.helpers.processes import Program

CONFIGS = ROOT / "configs/COCO-InstanceSegmentation"
KILLS = int(os.environ.get("SOAK_KILLS", "1"))
ITERATIONS = 12
VAL = "instances_val"
OPTIONS = {
    "py": [
        *(f"schedule.iterations={ITERATIONS}", "train.checkpoint_period=2", "train.seed=5"),
        *("train.accumulation=2", "train.ema_decay=0.9", "train.log_iterations=1"),
        *("train.period_unit=iterations", "train.eval_period=5", "train.keep_best=bbox/AP"),
        *("dataloader.train.batch_size=4", "dataloader.train.num_workers=2"),
        *("dataloader.train.augmentations.short_sides=[80,96]", "train.device=cpu"),
        *("dataloader.train.augmentations.crop=64", "model.backbone.bottom_up.drop_path_rate=0.5"),
        *("dataloader.test.0.augmentations.short_side=64", "train.report=True"),
    ],
    "yaml": [
        *("SOLVER.EPOCHS=0", f"SOLVER.MAX_ITER={ITERATIONS}", "SOLVER.CHECKPOINT_PERIOD=2"),
        *("SEED=5", "SOLVER.ACCUMULATION=2", "SOLVER.EMA_DECAY=0.9", "SOLVER.PRECISION=fp32"),
        *("SOLVER.LOG_ITERATIONS=1", "SOLVER.KEEP_BEST=bbox/AP", "TEST.EVAL_PERIOD=5"),
        "SOLVER.PERIOD_UNIT=iterations",
        *("SOLVER.IMS_PER_BATCH=4", "DATALOADER.NUM_WORKERS=0", "SOLVER.STEPS=(6,)"),
        *("MODEL.FOCALNET.VARIANT=focalnet_nano", "MODEL.FOCALNET.DROP_PATH_RATE=0.5"),
        *("MODEL.FPN.OUT_CHANNELS=16", "MODEL.ROI_BOX_HEAD.FC_DIM=32", "MODEL.DEVICE=cpu"),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM=16", "INPUT.MIN_SIZE_TRAIN=(64,80)"),
        *("INPUT.POLICY=resize", "INPUT.MIN_SIZE_TEST=64", "SOLVER.WARMUP_ITERS=0"),
    ],
}
CONFIG = {
    "py": CONFIGS / "mask_rcnn_focalnet_nano_fpn_small.py",
    "yaml": CONFIGS / "mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml",
}
# What depends on the clock, or on how a process met its images.
TIMES = ("time", "data_time", "eta_seconds", "rank_data_time")


def start(kind: str, processes: int, shapes: Path, output: Path) -> Program:
    words = ["--resume", "--config-file", CONFIG[kind], "--output", output]
    words += ["--coco-json", shapes / "annotations/instances_train.json"]
    words += ["--images", shapes / "images/train"]
    words += ["--val-json", shapes / "annotations/instances_val.json"]
    words += ["--val-images", shapes / "images/val"]
    words += ["--num-cpus", processes, *OPTIONS[kind]]
    return Program(TOOLS / "train_net.py", *words, merged=True, forks=True)


def finish(process: Program) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def opened(output: Path) -> int:
    """When a process last took the folder, 0 for never."""
    lock = output / "run.lock"
    return lock.stat().st_mtime_ns if lock.exists() else 0


def is_killed(process: Program, output: Path, seconds: float) -> bool:
    """Kills a run and its children at a moment between the opening of its folder and its end.

    Returns: whether it was there to be killed.
    """
    before = opened(output)
    while process.poll() is None and opened(output) == before:
        time.sleep(0.01)
    try:
        process.communicate(timeout=random.random() * seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.json").open()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), [("py", 2), ("yaml", 1)])
def test_killed_and_resumed_equals_uninterrupted(
    kind: str, processes: int, shapes: Path, tmp_path: Path
) -> None:
    """At random moments, evaluations, saves and the making of pictures included."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    finish(start(kind, processes, shapes, whole))
    seconds = ((whole / "predictions.png").stat().st_mtime_ns - opened(whole)) / 1e9
    kills = runs = 0
    while kills < KILLS:
        # A run is killed until it comes to its end before the next kill; then there is another.
        if is_killed(start(kind, processes, shapes, torn), torn, seconds):
            kills += 1
            if kills < KILLS:
                continue
        finish(start(kind, processes, shapes, torn))
        assert_same_end(torn, whole)
        shutil.rmtree(torn)
        runs += 1
    print(f"{kind}, {processes} processes: {kills} kills in {runs} runs")


def assert_same_end(torn: Path, whole: Path) -> None:
    assert metrics(torn) == metrics(whole)
    assert [line["iteration"] for line in metrics(torn)] == list(range(ITERATIONS))
    scored = [line["iteration"] for line in metrics(torn) if f"{VAL}/bbox/AP" in line]
    assert scored == [4, 9, 11]
    for name in ("model_final.pth", "model_ema.pth", "model_best.pth"):
        states = [torch.load(d / name, weights_only=True) for d in (torn, whole)]
        for state in states:
            state.pop("run", None)
            for time_taken in TIMES:
                (state.get("pending") or {}).pop(time_taken, None)
        equal_deeply(states[0], states[1], name)
    names = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if not path.name.startswith("events.out") and path not in numbered(folder)
        }
        for folder in (torn, whole)
    ]
    assert names[0] == names[1]
    # Processes whose launcher is killed are told to stop, and save once more.
    assert len(numbered(torn)) == len(numbered(whole))
    assert numbered(torn)[0].name >= numbered(whole)[0].name


def numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("model_[0-9]*.pth"))


def equal_deeply(first: Any, second: Any, where: str = "") -> None:
    """Bit-equal tensors and equal everything else."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            equal_deeply(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, pair in enumerate(zip(first, second, strict=True)):
            equal_deeply(*pair, f"{where}/{i}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


# The stream of training images.


def draws(batches: int, **options: Any) -> list[list[tuple[int, int]]]:
    stream = iter(StreamSampler(**{"groups": [0] * 7, "batch_size": 2, "seed": 3, **options}))
    return [next(stream) for _ in range(batches)]


def test_stream_is_detectron2s() -> None:
    theirs = iter(TrainingSampler(7, seed=3))
    ours = [index for batch in draws(20) for _, index in batch]
    assert ours == [next(theirs) for _ in range(40)]


@pytest.mark.parametrize("groups", [[0] * 7, [0, 1, 0, 1, 1, 0, 1]])
def test_stream_started_late_is_the_rest_of_it(groups: list[int]) -> None:
    assert draws(30, groups=groups)[11:] == draws(19, groups=groups, start=11)


def test_processes_share_the_stream() -> None:
    whole = draws(6, batch_size=4)
    parts = [draws(6, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(first + second) == batch


def test_batches_hold_one_group() -> None:
    groups = [0, 1, 0, 1, 1, 0, 1]
    for batch in draws(30, groups=groups, batch_size=3):
        assert len({groups[index] for _, index in batch}) == 1


def test_augmentation_depends_on_the_draw_alone() -> None:
    import numpy as np

    def mapper(record: dict[str, int]) -> dict[str, float]:
        numbers = {"a": np.random.rand(), "b": random.random(), "c": torch.rand(1).item()}
        return {**record, **numbers}

    images = StreamDataset([{"id": i} for i in range(3)], mapper, seed=1)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    first = images[(10, 1)]
    assert images[(11, 1)] != first != images[(10, 2)]
    assert images[(10, 1)] == first
    after = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    assert (before[0] == after[0]).all()
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    other = StreamDataset([{"id": i} for i in range(3)], mapper, seed=2)
    assert other[(10, 1)] != first


def test_a_skipped_image_is_replaced_and_counted() -> None:
    def mapper(record: dict[str, int]) -> dict[str, Any]:
        if record["id"] != 1:
            raise SkippedImage(UNREADABLE_IMAGE, f"image {record['id']} is torn")
        return {"id": 1, DATA_ISSUES: {CROWD: 2}}

    images = StreamDataset([{"id": i} for i in range(4)], mapper, seed=0)
    assert images[(0, 1)] == {"id": 1, DATA_ISSUES: {CROWD: 2}}
    found = images[(0, 2)]
    assert found["id"] == 1
    assert found[DATA_ISSUES][CROWD] == 2
    assert found[DATA_ISSUES][UNREADABLE_IMAGE] >= 1
    assert images[(0, 2)] == found
    none = StreamDataset([{"id": 0}], mapper, seed=0)
    with pytest.raises(ValueError, match=r"50 consecutive training images.*image 0 is torn"):
        none[(0, 0)]


def test_problems_are_counted_over_a_run() -> None:
    counted = trainer()
    counted.data_loader.open_at = lambda seed, first: [[{DATA_ISSUES: {CROWD: 2}}, {}]] * 9
    with pytest.raises(KeyError):  # these examples have no image, but they were counted before
        counted.train(0, 1)
    assert counted.total_tally().counts == {CROWD: 2}
    again = trainer()
    again.load_state_dict(counted.state_dict())
    assert again.total_tally().counts == {CROWD: 2}


# What is read from other trainers' files.


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([example["image"] for example in data])
        return {"loss": (self.weight * pixels).sum(dim=1).mean()}


def trainer(precision: str = "fp32", **options: Any) -> Trainer:
    model = Loss()
    data = [[{"image": torch.tensor(x)} for x in ([1.0, 2.0], [3.0, 4.0])]] * 10
    loader = TrainLoader(lambda seed, first: data[first:], num_images=2, batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    settings = TrainOptions(device="cpu", precision=precision, **options)
    return Trainer(model, loader, optimizer, settings)


def test_reads_the_states_of_detectron2s_trainers(caplog: pytest.LogCaptureFixture) -> None:
    data = [[{"image": torch.ones(2)}]] * 5
    for kind in (SimpleTrainer, AMPTrainer):
        model = Loss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        options: dict[str, Any] = {}
        if kind is AMPTrainer:  # by keyword: the position differs between v0.6 and main
            options["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=64.0)
        theirs = kind(model, data, optimizer, **options)
        model(data[0])["loss"].backward()
        optimizer.step()
        theirs.iter = 6
        state = {"optimizer": optimizer.state_dict(), **theirs.state_dict()}
        for nested in (state, {"iteration": 6, "_trainer": state}):
            ours = trainer("fp16" if kind is AMPTrainer else "fp32")
            ours.load_state_dict(nested)
            assert (ours.iter, ours.data_loader.start) == (6, 7)
            (moments,) = ours.optimizer.state.values()
            torch.testing.assert_close(moments["exp_avg"], torch.full((2,), 0.1))
            if kind is AMPTrainer:
                assert ours.scaler.get_scale() == 64
    assert "random states of 0 processes" in caplog.text


def test_a_file_without_optimizer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(ema_decay=0.5).load_state_dict({"iteration": 3})
    assert "no optimizer state" in caplog.text
    assert "no averaged weights" in caplog.text


def test_state_goes_round() -> None:
    first, second = trainer(ema_decay=0.9), trainer(ema_decay=0.9)
    first.train(0, 3)
    second.model.load_state_dict(first.model.state_dict())
    # A copy, as from a file: load_state_dict takes tensors over as they are.
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.train(3, 6)
    state, weights = first.state_dict(), first.model.state_dict()
    second.train(3, 6)
    equal_deeply(second.state_dict(), state)
    equal_deeply(second.model.state_dict(), weights)


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2}\n{"itera')
    drop_lines_from(path, 2)
    assert path.read_text() == '{"iteration": 0}\n{"iteration": 1}\n'
