"""What cannot be combined with sharding is refused before the first step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.utils import comm
from torch import nn

from focalnet_det.experiment import Experiment, TrainOptions
from focalnet_det.experiment.sharding_check import sharding_problems
from focalnet_det.layers.sync_batch_norm import DistributedBatchNorm
from tests.helpers.refused import BOXES, error


def problems(model: nn.Module, **options: Any) -> list[str]:
    given = SimpleNamespace(key=lambda name: f"train.{name}")
    experiment = SimpleNamespace(options=TrainOptions(device="cpu", **options), given=given)
    return sharding_problems(cast(Experiment, experiment), model)


def test_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), DistributedBatchNorm(3))
    batch_norm = nn.Sequential(plain, nn.BatchNorm2d(3))
    assert problems(batch_norm) == []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert problems(plain, sharding="fsdp") == []
    (ddp,) = problems(plain, sharding="fsdp", ddp={"static_graph": True})
    assert "train.ddp has no effect with train.sharding=fsdp" in ddp
    (growth,) = problems(plain, sharding="fsdp", init_levels="preserving")
    assert "grow the network without sharding first" in growth
    (norm,) = problems(batch_norm, sharding="fsdp")
    assert norm.startswith("1 is a batch norm with statistics of its own in each process")


def test_one_process_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(BOXES, ["train.sharding=fsdp"], files, capsys)
    assert "this run has one: use --num-gpus, --num-cpus or torchrun" in message
