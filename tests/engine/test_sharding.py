"""Sharded training equals DistributedDataParallel, and its checkpoints are ordinary ones."""

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.utils import comm
from torch import Tensor, distributed, nn

from focalnet_det import create_backbone
from focalnet_det.compat import create_local_process_group, find_fully_shard
from focalnet_det.engine import train as train_module
from focalnet_det.engine.run_folder import RunFolder
from focalnet_det.engine.sharding import gathered, is_sharded, load_whole, local_part, shard_model
from focalnet_det.experiment import Experiment
from focalnet_det.experiment.solver import adamw
from tests.helpers.processes import in_two_processes
from tests.helpers.toy_training import DATA, experiment

ITERATIONS = 5
HALF = 2
CLIP = 0.05


class Net(nn.Module):
    """A thin FocalNet with stochastic depth, and a layer of 5 rows, which two do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone(
            "focalnet_nano",
            embed_dim=8,
            depths=(1, 2, 1, 1),
            drop_path_rate=0.3,
            out_features=("stage4",),
        )
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.last = nn.Linear(64, 5)

    def forward(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = torch.stack([example["image"] for example in data])
        found = self.last(self.frozen(self.backbone(images)["stage4"].mean((2, 3))))
        return {"loss_a": found.square().mean(), "loss_b": found[:, 0].mean().abs()}


def images(seed: int, iteration: int) -> list[dict[str, Any]]:
    """Two images of a process."""
    draw = torch.Generator().manual_seed(1000 * seed + 2 * iteration + comm.get_rank())
    return [
        {"image": torch.randn(3, 32, 32, generator=draw), "file_name": f"{i}.png"} for i in range(2)
    ]


def train(folder: Path, *, resume: bool = False, **options: Any) -> None:
    """Train through the whole engine; processes evaluate different numbers of images."""

    def evaluate(_: Experiment, model: nn.Module, *, between: Callable[[], None]) -> dict[str, Any]:
        between()
        model.eval()
        with torch.no_grad():
            losses = [model(images(0, i))["loss_a"] for i in range(1 + comm.get_rank())]
        return {DATA: {"segm": {"AP": float(losses[0])}}} if comm.is_main_process() else {}

    settings = {"iterations": ITERATIONS, "read": images, "model": Net, "clip_norm": CLIP}
    settings |= {"ema_decay": 0.9, "keep_best": "segm/AP", "accumulation": 2, "eval_period": HALF}
    torch.manual_seed(comm.get_rank())
    parts = replace(
        experiment(folder, **(settings | options)), optimizer=lambda m: adamw(m, lr=1e-3)
    )
    with (
        mock.patch.object(train_module, "evaluate", evaluate),
        RunFolder.open(folder, resume=resume, overwrite=False) as opened,
    ):
        train_module.train(parts, opened, resume=resume)


def work(rank: int, folder: str) -> None:
    """Train with and without sharding, and resume each from the other."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    create_local_process_group(2)
    whole, sharded = Path(folder) / "ddp", Path(folder) / "fsdp"
    train(whole)
    train(sharded, sharding="fsdp")
    for source, options in ((whole, {"sharding": "fsdp"}), (sharded, {})):
        resumed = source.with_name(f"{source.name}_resumed")
        if rank == 0:
            shutil.copytree(source, resumed)
            for path in resumed.glob("model_*.pth"):
                if path.name != f"model_{HALF - 1:07d}.pth":
                    path.unlink()
        distributed.barrier()
        train(resumed, resume=True, **options)
    train(
        Path(folder) / "from_weights", sharding="fsdp", iterations=1, tested=False, keep_best="",
        init_checkpoint=str(whole / "model_final.pth"), ema_decay=0.0,
    )  # fmt: skip
    check_parts()
    distributed.destroy_process_group()


def check_parts() -> None:
    """Every parameter is divided; whole state goes round, on the first process alone or on all."""
    torch.manual_seed(7)
    net = Net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    shard_model(net)
    assert is_sharded(net)
    held = sum(local_part(p).numel() for p in net.parameters())
    total = sum(t.numel() for t in before.values())
    assert abs(held - total / 2) < 0.02 * total
    everywhere = gathered(net.state_dict(), everywhere=True)
    assert all(torch.equal(everywhere[name], t) for name, t in before.items())
    first = gathered(net.state_dict())
    assert (first["last.weight"] is None) == (comm.get_rank() == 1)
    load_whole(net, {name: t + 1 for name, t in before.items()})
    again = gathered(net.state_dict(), everywhere=True)
    assert all(torch.equal(again[name], t + 1) for name, t in before.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_fully_shard() is None:
        pytest.skip("PyTorch has no fully_shard: it is older than 2.6")
    folder = tmp_path_factory.mktemp("sharding")
    in_two_processes("tests.engine.test_sharding", "work", folder)
    return folder


def numbers(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by the keys that lead to it."""
    found = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                visit(item, f"{key}/{name}")
        elif isinstance(value, Tensor):
            assert type(value) in (Tensor, nn.Parameter), f"{key} is not an ordinary tensor"
            found[key] = value

    content = torch.load(path, weights_only=True)
    visit({name: content[name] for name in ("model", "trainer") if name in content}, "")
    return {key: t for key, t in found.items() if "random" not in key}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.json").open()]


@pytest.mark.parametrize("name", ["fsdp", "ddp_resumed", "fsdp_resumed"])
def test_sharded_training_equals_ddp(runs: Path, name: str) -> None:
    # The best model of a run that is resumed is that of its later evaluations.
    for file in ("model_final.pth", "model_ema.pth", "model_best.pth")[: 2 + (name == "fsdp")]:
        whole, sharded = (numbers(runs / n / file) for n in ("ddp", name))
        assert whole.keys() == sharded.keys(), file
        for key, tensor in whole.items():
            torch.testing.assert_close(
                sharded[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
    lines = [rows(runs / n) for n in ("ddp", name)]
    assert [len(x) for x in lines] == [ITERATIONS, ITERATIONS]
    for one, two in zip(*lines, strict=True):
        assert one["grad_norm"] > CLIP, "nothing was clipped"
        for key in (k for k in one if "loss" in k or k in ("grad_norm", "lr") or "AP" in k):
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key


def test_moments_are_whole(runs: Path) -> None:
    state = numbers(runs / "fsdp/model_final.pth")
    shapes = {tuple(t.shape) for key, t in state.items() if key.endswith("exp_avg")}
    trained = {tuple(p.shape) for p in Net().parameters() if p.requires_grad}
    assert shapes == trained
    assert any(t.abs().sum() > 0 for key, t in state.items() if key.endswith("exp_avg"))


def test_training_begins_with_given_weights(runs: Path) -> None:
    given = numbers(runs / "ddp/model_final.pth")
    after = numbers(runs / "from_weights/model_final.pth")
    changes = [
        (after[key] - given[key]).abs().max()
        for key in given
        if key.startswith("/model/") and given[key].is_floating_point()
    ]
    # AdamW's first step is the learning rate, and a little for the decay.
    assert 0.0009 < float(max(changes)) < 0.0012
