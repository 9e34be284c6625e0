"""What is resumed is whole and is this run's, or one sentence says why not."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine import main as main_module
from focalnet_det.engine.checkpoints import newest_whole
from focalnet_det.engine.resume import config_changes, flatten, load_optimizer
from focalnet_det.visualization.curves import read_curves
from tests.helpers import toy_training as toy

ITERATIONS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with checkpoints after 2, 4 and 6 iterations."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    toy.run(folder, iterations=ITERATIONS, ema_decay=0.9)
    return folder


@pytest.fixture
def interrupted(whole: Path, tmp_path: Path) -> Path:
    """The same run, killed after its fifth iteration."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "model_final.pth").unlink()
    (folder / "model_ema.pth").unlink()
    return folder


def resume(folder: Path, **changes: Any) -> dict[str, Any]:
    return toy.run(
        folder, **({"iterations": ITERATIONS, "ema_decay": 0.9, "resume": True} | changes)
    )


def final(folder: Path, name: str = "model_final.pth") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def same_weights(folder: Path, other: Path) -> bool:
    first, second = final(folder)["model"], final(other)["model"]
    return all(torch.equal(first[n], second[n]) for n in first)


def test_resumed_equals_uninterrupted(interrupted: Path, whole: Path) -> None:
    resume(interrupted)
    assert same_weights(interrupted, whole)
    averaged = final(interrupted, "model_ema.pth")["model"]["weight"]
    assert torch.equal(averaged, final(whole, "model_ema.pth")["model"]["weight"])


def flip(path: Path) -> None:
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Not found</body></html>")


def weights_alone(path: Path) -> None:
    torch.save({"model": {}}, path)


DAMAGES = {
    flip: "checksum",
    truncate: "",
    empty: "empty",
    html: "HTML",
    weights_alone: "not a training state",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_broken_checkpoint_is_named_and_the_one_before_taken(
    damage: Any, interrupted: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(interrupted / "model_0000003.pth")
    resume(interrupted)
    (message,) = (r.getMessage() for r in caplog.records if "Skipped" in r.getMessage())
    assert "model_0000003.pth" in message
    assert DAMAGES[damage] in message
    assert (interrupted / "model_0000003.pth.broken").exists()
    assert same_weights(interrupted, whole)


def test_only_broken_checkpoints_are_an_error(interrupted: Path) -> None:
    for name in ("model_0000001.pth", "model_0000003.pth"):
        empty(interrupted / name)
    with pytest.raises(ValueError, match=r"0000003\.pth: it is empty; .*0000001\.pth.*--resume"):
        resume(interrupted)
    assert (interrupted / "model_0000003.pth").exists()


def test_last_checkpoint_is_for_others(interrupted: Path, whole: Path) -> None:
    """Neither a missing file nor one that names a file that is gone matters."""
    (interrupted / "last_checkpoint").unlink()
    assert newest_whole(interrupted) == interrupted / "model_0000003.pth"
    (interrupted / "last_checkpoint").write_text("model_0000099.pth")
    resume(interrupted)
    assert same_weights(interrupted, whole)


def test_nothing_to_resume_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        resume(tmp_path)
    assert f"No checkpoint in {tmp_path}. Starting from the beginning." in caplog.text


class Wider(toy.Product):
    """Another shape, as after another ``embed_dim`` or class count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


class Deeper(toy.Product):
    """Another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Wider}, r"weight is \(2,\) in the checkpoint and \(3,\) here"),
        ({"model": Deeper}, "the checkpoint lacks bias"),
        ({"fingerprint": "9 images"}, "the training data was toy data, but is now 9 images"),
        ({"config": "model: {width: 3}"}, "model.width was 2, is 3 now"),
        ({"config": "model: {}"}, "model.width was 2, is absent now"),
    ],
)
def test_another_run_is_refused(changes: Any, message: str, interrupted: Path) -> None:
    before = sorted(path.name for path in interrupted.iterdir())
    lines = (interrupted / "metrics.json").read_text()
    advice = r".*new run from its weights.*train\.init_checkpoint="
    with pytest.raises(ValueError, match=message + advice):
        resume(interrupted, **changes)
    assert sorted(path.name for path in interrupted.iterdir()) == before
    assert (interrupted / "metrics.json").read_text() == lines


def test_a_new_rate_is_applied_and_said(
    interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = "model: {width: 2}\noptimizer: {lr: 0.01}"
    with caplog.at_level("INFO"):
        resume(interrupted, lr=0.01, config=config)
    assert "since the checkpoint: optimizer.lr was absent, is 0.01 now" in caplog.text
    group = final(interrupted)["trainer"]["optimizer"]["param_groups"][0]
    assert group["initial_lr"] == 0.01
    rows = [json.loads(line) for line in (interrupted / "metrics.json").open()]
    # Cosine after four of six iterations: (1 + cos(2 pi / 3)) / 2 = 1/4.
    assert rows[4]["lr"] == pytest.approx(0.0025)


def test_which_changes_are_applied() -> None:
    before = flatten(
        "model: {num_classes: 3, activation_checkpointing: false}\n"
        "optimizer: {lr: 1.0}\nschedule: {iterations: 5}\ntrain: {seed: 1, eval_period: 2}\n"
        "dataloader: {train: {batch_size: 2, num_workers: 4}, test: [{dataset: a}]}"
    )
    after = flatten(
        "model: {num_classes: 4, activation_checkpointing: true}\n"
        "optimizer: {lr: 2.0}\nschedule: {iterations: 6}\ntrain: {seed: 2, eval_period: 3}\n"
        "dataloader: {train: {batch_size: 3, num_workers: 0}, test: [{dataset: b}]}"
    )
    applied, refused = config_changes(before, after)
    assert [text.split()[0] for text in refused] == [
        "dataloader.train.batch_size", "model.num_classes", "train.seed"
    ]  # fmt: skip
    assert len(applied) == 6
    yacs = {"SOLVER.BASE_LR": "1", "SOLVER.IMS_PER_BATCH": "2", "INPUT.MIN_SIZE_TEST": "80"}
    applied, refused = config_changes(yacs, dict.fromkeys(yacs, "9"))
    assert [text.split()[0] for text in refused] == ["SOLVER.IMS_PER_BATCH"]


def test_the_optimizer_must_fit() -> None:
    model = nn.Linear(2, 2)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    adamw.step()
    state = adamw.state_dict()
    with pytest.raises(ValueError, match="another kind of optimizer"):
        load_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), state)
    with pytest.raises(
        ValueError, match=r"exp_avg of a parameter of shape \(3, 2\) has shape \(2, 2\)"
    ):
        load_optimizer(torch.optim.AdamW(nn.Linear(2, 3).parameters(), lr=0.1), state)
    with pytest.raises(ValueError, match=r"sizes \[2\] in the checkpoint, \[1\] here"):
        load_optimizer(torch.optim.AdamW([model.weight], lr=0.1), state)


def test_a_longer_training_goes_on(interrupted: Path, whole: Path) -> None:
    resume(interrupted)
    resume(interrupted, iterations=8)
    assert final(interrupted)["iteration"] == 7
    assert (interrupted / "model_0000005.pth").exists()
    lines = (interrupted / "metrics.json").read_text().splitlines()
    assert len(lines) == 8


def test_a_shorter_training_is_finished(interrupted: Path) -> None:
    """Four iterations are done, three are asked for."""
    resume(interrupted, iterations=3)
    assert final(interrupted)["iteration"] == 3
    assert (interrupted / "model_ema.pth").exists()


def test_a_refused_resumption_leaves_the_config_of_the_run(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the message asks for: "Use the config that it was made with"."""
    before = (interrupted / "config.yaml").read_text()
    monkeypatch.setattr(main_module, "check", lambda experiment, **_: experiment)
    for config, accepted in (
        ("model: {width: 3}", False),
        ("optimizer: {lr: 0.2}\n" + before, True),
    ):
        monkeypatch.setattr(
            main_module,
            "describe",
            lambda _, config=config: toy.experiment(
                interrupted, iterations=5, tested=False, ema_decay=0.9, config=config
            ),
        )
        with contextlib.nullcontext() if accepted else pytest.raises(ValueError, match="width"):
            main_module.run(main_module.RunArguments(config_file="toy.py", resume=True))
        assert ((interrupted / "config.yaml").read_text() == before) != accepted


@pytest.mark.parametrize(
    "garbage", [b"\xff\xfe\x00", b"[1]\n", b"3\n", b'{"iteration": Infinity}\n', b"\x00" * 99]
)
def test_damaged_lines_of_metrics_are_left_out(interrupted: Path, garbage: bytes) -> None:
    path = interrupted / "metrics.json"
    whole = path.read_bytes()
    path.write_bytes(garbage + b"\n" + whole + garbage)
    assert set(read_curves(path)) >= {"total_loss", "lr"}
    resume(interrupted)
    rows = [json.loads(line)["iteration"] for line in path.read_text().splitlines()]
    assert rows == list(range(ITERATIONS))


def test_keeping_the_best_needs_something_to_compare(tmp_path: Path) -> None:
    """Said before the first iteration, not after the first evaluation."""

    def read(*_: int) -> list[dict[str, Any]]:
        raise AssertionError("an iteration was begun")

    with pytest.raises(ValueError, match="keep_best=segm/AP requires a test set"):
        toy.run(tmp_path, keep_best="segm/AP", tested=False, read=read)
    for name in ("AP", "segm/", "/AP"):
        with pytest.raises(ValueError, match="keep_best must be TASK/METRIC"):
            toy.run(tmp_path, keep_best=name, read=read)


def test_averaged_weights_are_not_dropped_in_silence(
    interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resume(interrupted, ema_decay=0.0)
    assert "averaged weights of the checkpoint: ema_decay is 0" in caplog.text
