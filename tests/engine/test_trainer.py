"""The features of the training loop, against slow loops and hand-worked numbers."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from focalnet_det import create_backbone
from focalnet_det.data.loader import TrainLoader
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.engine.ema import averaged_model
from focalnet_det.engine.hooks import ProfilerHook
from focalnet_det.engine.run import git_state
from focalnet_det.engine.train import describe
from focalnet_det.engine.trainer import Trainer, send_images
from focalnet_det.experiment import TrainOptions, load_config, read_experiment
from focalnet_det.experiment.solver import parameter_groups
from focalnet_det.necks.fpn import build_fpn
from tests.helpers.paths import ROOT

NANO = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"


class Product(nn.Module):
    """Loss: the mean over the images of weight . image; its gradient is the mean image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.count += len(data)
        images = torch.stack([example["image"] for example in data])
        return {"loss": (images @ self.weight).mean()}


def product_trainer(batches: list[list[list[float]]], lr: float = 1.0, **options: Any) -> Trainer:
    data = [[{"image": torch.tensor(image)} for image in batch] for batch in batches]
    loader = TrainLoader(lambda seed, start: data[start:], num_images=4, batch_size=4)
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Trainer(model, loader, optimizer, TrainOptions(device="cpu", **options))


def test_accumulated_gradient_is_that_of_the_batch() -> None:
    batch = [[1.0, 0.0], [3.0, 0.0], [5.0, 4.0], [7.0, 4.0]]
    for parts in (1, 2, 4):
        trainer = product_trainer([batch], accumulation=parts)
        trainer.train(0, 1)
        # The mean image is (4, 2), and the rate 1.
        torch.testing.assert_close(trainer.model.weight.data, torch.tensor([-4.0, -2.0]))
    with pytest.raises(
        ValueError, match="4 images per process cannot be split evenly into 3 parts"
    ):
        product_trainer([batch], accumulation=3).train(0, 1)


def example(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, 96, 96), generator=generator, dtype=torch.uint8)
    instances = Instances((96, 96))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8, 48, 40], [50, 30, 90, 90]]))
    instances.gt_classes = torch.tensor([1, 2])
    masks = torch.zeros(2, 96, 96, dtype=torch.bool)
    masks[0, 8:40, 8:48] = masks[1, 30:90, 50:90] = True
    instances.gt_masks = BitMasks(masks)
    return {"image": image, "instances": instances, "height": 96, "width": 96}


def test_accumulation_on_a_detector_equals_the_large_batch() -> None:
    """4 parts of 2 images and 8 images at once: the first updates agree to 1e-6.

    A detector draws anchors and RoIs at random and averages over those of a forward pass. So here
    all are drawn, and the images are one image, for the averages to be over equal counts.
    """
    everything = [
        "model.proposal_generator.batch_size_per_image=1000000",
        "model.roi_heads.batch_size_per_image=1000000",
        "model.roi_heads.num_classes=3",
    ]
    torch.manual_seed(0)
    first = read_experiment(load_config(NANO, everything)).model()
    second = copy.deepcopy(first)
    batch = [example(1)] * 8
    for model, parts in ((first, 1), (second, 4)):
        loader = TrainLoader(lambda seed, start: [batch] * 3, num_images=8, batch_size=8)
        # A momentum-free step: what differs in the gradients differs in the weights.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        options = TrainOptions(device="cpu", accumulation=parts)
        Trainer(model, loader, optimizer, options).train(0, 3)
    pairs = zip(first.named_parameters(), second.parameters(), strict=True)
    for (name, left), right in pairs:
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: n + m)


def test_average_follows_the_weights() -> None:
    batches = [[[float(i), -1.0]] * 4 for i in range(6)]
    trainer = product_trainer(batches, ema_decay=0.3)
    trainer.train(0, 6)
    weight, average, image = 0.0, 0.0, 0.0
    for n in range(6):
        image = float(n)
        weight -= image
        # The first update copies; update n has decay min(0.3, (1 + n) / (10 + n)).
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        average = decay * average + (1 - decay) * weight
    assert trainer.model.weight[0].item() == pytest.approx(weight)
    assert trainer.ema.module.weight[0].item() == pytest.approx(average)
    assert trainer.evaluated_model is trainer.ema.module
    assert trainer.ema.module.count == trainer.model.count == 24
    for decay in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            averaged_model(nn.Linear(1, 1), decay)


def test_clipping() -> None:
    batch = [[3.0, -4.0]] * 4
    for options, expected in (
        ({}, (-3.0, 4.0)),
        ({"clip_norm": 1.0}, (-0.6, 0.8)),
        ({"clip_norm": 10.0}, (-3.0, 4.0)),
        ({"clip_value": 3.5}, (-3.0, 3.5)),
    ):
        trainer = product_trainer([batch], **options)
        trainer.train(0, 1)
        torch.testing.assert_close(
            trainer.model.weight.data, torch.tensor(expected), rtol=1e-5, atol=1e-5
        )


def test_layer_decay() -> None:
    """Nano has 1, 1, 3 and 1 blocks; at a factor of 1/2 the rates are powers of two."""
    neck = build_fpn(focalnet_backbone("focalnet_nano", embed_dim=8), out_channels=8)
    by_id = {id(p): n for n, p in neck.named_parameters()}
    groups = parameter_groups(neck, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {by_id[id(p)]: group["lr"] for group in groups for p in group["params"]}
    layers = {
        "bottom_up.patch_embed.proj.weight": 7,
        "bottom_up.patch_embed.norm.weight": 7,
        "bottom_up.layers.0.blocks.0.modulation.f.weight": 6,
        "bottom_up.layers.0.downsample.proj.weight": 5,
        "bottom_up.layers.1.blocks.0.norm1.bias": 5,
        "bottom_up.layers.1.downsample.norm.weight": 4,
        "bottom_up.layers.2.blocks.0.mlp.fc1.weight": 4,
        "bottom_up.layers.2.blocks.2.mlp.fc1.weight": 2,
        "bottom_up.layers.2.downsample.proj.bias": 1,
        "bottom_up.layers.3.blocks.0.modulation.h.weight": 1,
        "bottom_up.norm0.weight": 1,
        "bottom_up.norm3.weight": 1,
        "fpn_lateral2.weight": 0,
    }
    assert {name: rates[name] for name in layers} == {n: 0.5**k for n, k in layers.items()}
    alone = create_backbone("focalnet_nano", embed_dim=8)
    found = {g["lr"] for g in parameter_groups(alone, lr=1.0, weight_decay=0.1, layer_decay=0.5)}
    assert found == {0.5**k for k in range(1, 8)}


def test_backbone_multiplier_of_a_lazy_config() -> None:
    keys = ["+optimizer.lr_factors.bottom_up=0.1", "optimizer.layer_decay=0.5"]
    experiment = read_experiment(load_config(NANO, keys))
    model = experiment.model()
    by_id = {id(p): n for n, p in model.named_parameters()}
    groups = experiment.optimizer(model).param_groups
    rates = {by_id[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates["backbone.fpn_output2.weight"] == 1e-3
    assert rates["backbone.bottom_up.norm1.weight"] == pytest.approx(0.5e-4)


def test_backbone_multiplier_and_layer_decay_of_a_yaml_config() -> None:
    yaml = NANO.with_name("mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml")
    keys = ["MODEL.FOCALNET.VARIANT=focalnet_nano", "MODEL.DEVICE=cpu"]
    keys += ["SOLVER.BACKBONE_MULTIPLIER=0.1", "SOLVER.LAYER_DECAY=0.5"]
    experiment = read_experiment(load_config(yaml, keys))
    model = experiment.model()
    by_id = {id(p): n for n, p in model.named_parameters()}
    groups = experiment.optimizer(model).param_groups
    rates = {by_id[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates["backbone.fpn_output2.weight"] == 1e-4
    assert rates["backbone.bottom_up.norm1.weight"] == pytest.approx(0.5e-5)
    assert rates["backbone.bottom_up.patch_embed.proj.weight"] == pytest.approx(1e-5 / 2**7)


def test_another_batch_than_the_recipes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        describe(nn.Linear(1, 1), 10, 16, 5, TrainOptions(device="cpu", recipe_batch=16))
        assert "linear scaling rule" not in caplog.text
        describe(nn.Linear(1, 1), 10, 4, 5, TrainOptions(device="cpu", recipe_batch=16))
    assert "The batch size of the recipe is 16, that of this run is 4" in caplog.text
    assert "multiplying the learning rate by 0.25" in caplog.text


def test_git_state(tmp_path: Path) -> None:
    assert "not a checkout" in git_state(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    assert git_state(tmp_path).endswith(", unchanged.")
    (tmp_path / "new.py").write_text("")
    assert git_state(tmp_path).endswith(", with changes:\n?? new.py")


# Profiles.


class FakeTrainer:
    def __init__(self, max_iter: int) -> None:
        self.iter, self.max_iter = 0, max_iter


def test_profile_of_a_window(tmp_path: Path) -> None:
    profiler = ProfilerHook(tmp_path, 1, 2)
    profiler.trainer = FakeTrainer(max_iter=5)
    with EventStorage():
        for i in range(5):
            profiler.trainer.iter = i
            profiler.before_step()
            torch.ones(3) @ torch.ones(3)
            profiler.after_step()
            assert (tmp_path / "profile.txt").exists() == (i >= 2)
    assert "aten::dot" in (tmp_path / "profile.txt").read_text()
    assert json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        ProfilerHook(tmp_path, 3, 1)


# torchrun.


@pytest.mark.slow
def test_torchrun_continues_after_a_worker_died(shapes: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--standalone", str(ROOT / "tools/train_net.py")]
    command += ["--config-file", str(NANO), "--output", str(tmp_path)]
    command += ["--coco-json", str(shapes / "annotations/instances_train.json")]
    command += ["--images", str(shapes / "images/train")]
    command += ["--val-json", str(shapes / "annotations/instances_val.json")]
    command += ["--val-images", str(shapes / "images/val"), "schedule.iterations=12"]
    command += ["train.checkpoint_period=2", "train.log_iterations=1", "train.device=cpu"]
    command += ["dataloader.train.batch_size=2", "dataloader.train.num_workers=0"]
    command += ["dataloader.train.augmentations.short_sides=[64]", "train.seed=1"]
    command += ["dataloader.train.augmentations.crop=64", "train.eval_period=0"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = tmp_path / "metrics.json"
    try:
        while process.poll() is None and not (
            lines.exists() and len(lines.read_text().splitlines()) >= 4
        ):
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0][-3000:]
        os.kill(child_of(process.pid), signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    assert "Resuming from iteration" in output
    done = [json.loads(line)["iteration"] for line in lines.open()]
    assert done == list(range(12))
    assert "segm" in json.loads(
        (tmp_path / "evaluation/instances_val/coco_metrics.json").read_text()
    )


def child_of(pid: int) -> int:
    """A direct child process."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("this system does not list child processes under /proc")
    return int(children.read_text().split()[-1])


def test_losses_and_norm_arrive_by_name_whatever_their_type() -> None:
    losses = {"a": torch.tensor(1.5), "b": torch.tensor(-2.0, dtype=torch.bfloat16)}
    found, norm, bad = product_trainer([])._checked(losses, torch.tensor(0.5))
    assert {name: loss.item() for name, loss in found.items()} == {"a": 1.5, "b": -2.0}
    assert (norm, bad) == (0.5, False)


def test_images_stay_where_they_are_without_a_gpu() -> None:
    image = torch.zeros(3, 2, 2)
    data = [{"image": image}]
    send_images(data, "cpu")
    assert data[0]["image"] is image
