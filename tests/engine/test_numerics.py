"""Losses and gradients that are not finite: noticed, named, replayed, and never saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.main import RunArguments, run
from focalnet_det.engine.memory import explain_memory
from focalnet_det.engine.numerics import (
    NumericalTrouble,
    all_finite,
    gradient_norm,
    pack_example,
    unpack_example,
)
from focalnet_det.experiment import TrainOptions
from tests.helpers import toy_training as toy
from tests.helpers.paths import ROOT, TOOLS
from tests.helpers.processes import run_program

NANO = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"


class SpoiltGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN where the value is 7."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x == 7, torch.nan, grad)


class Fragile(toy.Product):
    """Losses stay finite; an image with a 7 spoils the gradient, one with a 9 the loss."""

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = torch.stack([example["image"] for example in data])
        scores = SpoiltGradient.apply(images + 0 * self.weight) @ self.weight
        losses = {"loss": scores.mean(), "loss_b": (0 * self.weight).sum()}
        self.count += len(data)
        if (images == 9).any():
            losses["loss_b"] = losses["loss_b"] + float("inf")
        return losses


def spoilt(at: int, value: float, times: int = 1) -> Any:
    """Batches of which those from one iteration on hold a value, at the first few readings."""
    left = times

    def read(seed: int, iteration: int) -> list[dict[str, Any]]:
        nonlocal left
        batch = toy.batch(seed, iteration)
        if iteration == at and left:
            left -= 1
            batch[1]["image"] = torch.tensor([0.0, value])
        return batch

    return read


@pytest.mark.parametrize("at", [4, 7], ids=["midway", "at the last iteration"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7.0, r"the gradient of weight is not finite"),
        (9.0, r"loss_b is inf"),
    ],
)
def test_stops_and_saves_nothing_bad(at: int, value: float, reason: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": Fragile, "iterations": 8}
    message = rf"Iteration {at + 1}: .*{reason}.*Images: {at}_0.png, {at}_1.png.*replay_step\.py"
    with pytest.raises(NumericalTrouble, match=message):
        toy.run(tmp_path, read=spoilt(at, value), **options)
    assert not (tmp_path / "model_final.pth").exists()
    for path in tmp_path.glob("model_*.pth"):
        assert all_finite(torch.load(path, weights_only=True)["model"].values())
    # The weights before the iteration, and the examples.
    trouble = torch.load(tmp_path / f"trouble_{at:07d}.pth", weights_only=True)
    assert trouble["processes"][0]["data"][1]["image"].tolist() == [0.0, value]
    assert trouble["model"]["weight"].isfinite().all()
    # Without the bad image the run goes on.
    toy.run(tmp_path, resume=True, **options)
    assert (tmp_path / "model_final.pth").exists()


def test_skip_leaves_the_update_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"model": Fragile, "on_nan": "skip", "iterations": 4}
    toy.run(tmp_path, read=spoilt(2, 7.0), **options)
    assert "Skipped update 1 of at most 10" in caplog.text
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    steps = {float(s["step"]) for s in state["trainer"]["optimizer"]["state"].values()}
    assert steps == {3.0}
    assert state["trainer"]["skipped"] == 1
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert "NaN" not in "".join(lines)
    assert len(lines) == 4


def test_skipping_has_a_limit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": Fragile, "on_nan": "skip", "nan_limit": 2}

    def read(seed: int, iteration: int) -> list[dict[str, Any]]:
        return [{"image": torch.tensor([7.0, 0.0])}] * 2

    limit = r"Iteration 3: .*The limit of 2 \(train.nan_limit\) is reached"
    with pytest.raises(NumericalTrouble, match=limit):
        toy.run(tmp_path, read=read, **options)


def test_rewinding_needs_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": Fragile, "on_nan": "rewind"}
    with pytest.raises(NumericalTrouble, match="Iteration 1: .*no checkpoint to rewind to"):
        toy.run(tmp_path, read=spoilt(0, 9.0), **options)


def test_rewind_goes_back_and_draws_other_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_at: list[tuple[int, int]] = []
    bad = spoilt(3, 9.0)

    def read(seed: int, iteration: int) -> list[dict[str, Any]]:
        read_at.append((seed, iteration))
        return bad(seed, iteration)

    toy.run(tmp_path, read=read, model=Fragile, on_nan="rewind", iterations=5)
    assert "Rewinding to iteration 2 with different batches (1 of at most 10 times)" in caplog.text
    assert read_at == [(3, 0), (3, 1), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4)]
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert len(lines) == 5


def test_rewind_needs_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": Fragile, "on_nan": "rewind"}
    with pytest.raises(NumericalTrouble, match="Iteration 2:"):
        toy.run(tmp_path, read=spoilt(1, 9.0, times=9), **options)
    with pytest.raises(NumericalTrouble, match="Iteration 4:"):
        toy.run(tmp_path, read=spoilt(3, 9.0, times=99), nan_limit=2, **options)


class SpoiltStatistics(toy.Product):
    """Losses and gradients stay finite, a buffer does not, as the variance of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("variance", torch.ones(1))

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.count >= 6:
            self.variance.mul_(float("nan"))
        return super().forward(data)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_what_no_loss_shows_is_not_saved(ema_decay: float, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": SpoiltStatistics, "ema_decay": ema_decay}
    with pytest.raises(
        NumericalTrouble, match="variance is not finite, so no checkpoint was saved"
    ):
        toy.run(tmp_path, keep_best="segm/AP", **options)
    assert [path.name for path in tmp_path.glob("model_*.pth")] == ["model_0000001.pth"]


class Saying(toy.Product):
    """Detectron2's proposal generators raise errors of their own."""

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if any((example["image"] == 9).any() for example in data):
            raise FloatingPointError("Predicted boxes contain NaN.")
        return super().forward(data)


def test_what_a_model_says_itself_counts(tmp_path: Path) -> None:
    with pytest.raises(NumericalTrouble, match=r"Iteration 3: Predicted .* NaN\. Images: 2_0.png"):
        toy.run(tmp_path / "a", model=Saying, read=spoilt(2, 9.0))
    assert (tmp_path / "a/trouble_0000002.pth").exists()
    toy.run(tmp_path / "b", model=Saying, read=spoilt(2, 9.0), on_nan="skip")
    assert (tmp_path / "b/model_final.pth").exists()


class Overflowing(toy.Product):
    """Gradients overflow whatever the scale is."""

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        losses = super().forward(data)
        return {"loss": losses["loss"] + SpoiltGradient.apply(self.weight + 7).sum()}


def test_a_collapsing_scale_is_noticed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "fp16", "iterations": 100, "tested": False}
    with pytest.raises(NumericalTrouble, match=r"26 consecutive updates overflowed in fp16"):
        toy.run(tmp_path, model=Overflowing, **options)


def test_the_norm_is_that_of_all_gradients() -> None:
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).pow(2).sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    torch.testing.assert_close(gradient_norm(model.parameters()), expected)
    assert gradient_norm(nn.Linear(1, 1).parameters()) == 0


def test_examples_survive_a_file(tmp_path: Path) -> None:
    instances = Instances((4, 6))
    instances.gt_boxes = Boxes(torch.tensor([[0.5, 1, 3, 4]]))
    instances.gt_masks = BitMasks(torch.ones(1, 4, 6, dtype=torch.bool))
    instances.gt_classes = torch.tensor([2])
    outlines = Instances((4, 6), gt_masks=PolygonMasks([[[0.0, 0, 4, 0, 4, 4]]]))
    example = {"image": torch.rand(3, 4, 6), "height": 8, "instances": instances}
    torch.save(pack_example({**example, "others": [outlines]}), tmp_path / "file")
    read = unpack_example(torch.load(tmp_path / "file", weights_only=True))
    assert torch.equal(read["image"], example["image"])
    assert read["height"] == 8
    found = read["instances"]
    assert found.image_size == (4, 6)
    assert torch.equal(found.gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(found.gt_masks.tensor, instances.gt_masks.tensor)
    assert torch.equal(found.gt_classes, instances.gt_classes)
    (again,) = read["others"]
    assert again.gt_masks.polygons[0][0].tolist() == [0.0, 0, 4, 0, 4, 4]


@pytest.mark.slow
def test_a_detectors_trouble_is_replayed(shapes: Path, tmp_path: Path) -> None:
    """An absurd rate spoils the weights; the file alone says where."""
    options = ["dataloader.train.batch_size=2", "dataloader.train.augmentations.crop=64"]
    options += ["dataloader.train.augmentations.short_sides=[64]", "optimizer.lr=1e12"]
    options += ["schedule.iterations=9", "schedule.warmup_iterations=0", "train.device=cpu"]
    args = RunArguments(
        config_file=str(NANO),
        opts=options,
        output=str(tmp_path),
        coco_json=[str(shapes / "annotations/instances_train.json")],
        images=[str(shapes / "images/train")],
    )
    with pytest.raises(NumericalTrouble, match=r"trouble_\d+\.pth"):
        run(args)
    (path,) = tmp_path.glob("trouble_*.pth")
    done = run_program(TOOLS / "replay_step.py", path)
    assert done.returncode == 0, done.stderr
    assert "process 0: " in done.stdout
    assert ".jpg" in done.stdout or ".png" in done.stdout
    assert "first module with an output that is not finite: backbone" in done.stdout
    largest = float(done.stdout.rpartition("largest weight: ")[2].split(", ")[1])
    assert largest > 1e9


# Memory.


class Hungry(toy.Product):
    """Runs out of memory until its activations are checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.activation_checkpointing = False

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        noise = torch.rand(1)
        if self.count == 4 and not self.activation_checkpointing:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        losses = super().forward(data)
        return {"loss": losses["loss"] + 0 * noise.sum()}


def test_out_of_memory_says_what_helps(tmp_path: Path) -> None:
    advice = r"Out of memory: weights take.*train\.accumulation=2.*train\.oom_retry=true.*bf16"
    with pytest.raises(MemoryError, match=advice):
        toy.run(tmp_path, model=Hungry)


def test_out_of_memory_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the same random numbers: the end is that of a run that had the memory."""

    class Sated(Hungry):
        def __init__(self) -> None:
            super().__init__()
            self.activation_checkpointing = True

    toy.run(tmp_path / "a", model=Hungry, oom_retry=True)
    assert "Retrying with activation checkpointing" in caplog.text
    toy.run(tmp_path / "b", model=Sated)
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]["weight"]
        for name in "ab"
    )
    assert torch.equal(first, second)


def test_memory_in_words() -> None:
    model = nn.Linear(2**14, 2**14, bias=False)  # 1 GiB
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    data = [{"image": torch.zeros(3, 800, 1216)}, {"image": torch.zeros(3, 4, 4)}]
    text = explain_memory(model, optimizer, data, TrainOptions(device="cpu", precision="bf16"))
    assert "weights take 1.0 GiB" in text
    assert "2 image(s) at a time, the largest 800 x 1216 pixels" in text
    assert "train.precision" not in text
