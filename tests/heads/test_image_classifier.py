"""Losses of classification against timm's, and masks of pretraining that depend on names alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("timm", reason="timm is a test dependency")

from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from focalnet_det.backbones import build_backbone
from focalnet_det.experiment.solver import Schedule, parameter_groups
from focalnet_det.heads.image_classifier import IMAGENET_MEAN, IMAGENET_STD, ImageClassifier
from focalnet_det.heads.masked_pretraining import MaskedPretraining

CLASSES = 5


def backbone() -> Any:
    return build_backbone(
        "focalnet_nano", embed_dim=8, depths=(1, 1, 1, 1), output_norm=False, drop_path_rate=0.0
    )


def batch(count: int = 4, side: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return [
        {"image": x, "label": i % CLASSES, "file_name": f"{i}.png"} for i, x in enumerate(images)
    ]


def normalized(records: list[dict[str, Any]]) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.stack([(r["image"].float() - mean) / std for r in records])


def seed() -> None:
    random.seed(4)
    np.random.seed(4)
    torch.manual_seed(4)


def test_the_loss_of_mixed_batches_is_that_of_timm() -> None:
    model = ImageClassifier(
        backbone=backbone(),
        num_classes=CLASSES,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        erasing=0.9,
    )
    records = batch()
    seed()
    loss = model(records)["loss_cls"]
    seed()
    images = RandomErasing(0.9, mode="pixel", device="cpu")(normalized(records))
    images, target = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)(
        images, torch.tensor([r["label"] for r in records])
    )
    assert not torch.equal(images, normalized(records))
    expected = SoftTargetCrossEntropy()(model(images), target)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="even number of images in a process, got 3"):
        model(batch(3))


def test_the_loss_of_plain_batches_is_that_of_timm() -> None:
    model = ImageClassifier(backbone=backbone(), num_classes=CLASSES, label_smoothing=0.2)
    records = batch(3)
    labels = torch.tensor([r["label"] for r in records])
    expected = LabelSmoothingCrossEntropy(0.2)(model(normalized(records)), labels)
    torch.testing.assert_close(model(records)["loss_cls"], expected)


@torch.no_grad()
def test_scores_are_the_logits_of_normalized_images() -> None:
    model = ImageClassifier(backbone=backbone(), num_classes=CLASSES, mixup=0.8).eval()
    records = batch(2)
    outputs = model(records)
    expected = model(normalized(records))
    torch.testing.assert_close(torch.stack([o["class_scores"] for o in outputs]), expected)
    uneven = [*batch(1), *batch(1, side=32)]
    with pytest.raises(ValueError, match="must have one size"):
        model(uneven)


@torch.no_grad()
def test_masks_of_evaluation_follow_the_file_name() -> None:
    model = MaskedPretraining(backbone=backbone(), mask_unit=16).eval()
    record = batch(1, side=70)[0]
    first, again = (model([record])[0]["masked_image"] for _ in range(2))
    assert first["loss"] == again["loss"]
    assert torch.equal(first["masked"], again["masked"])
    moved = model([{**record, "file_name": "elsewhere/0.png"}])[0]["masked_image"]
    assert torch.equal(first["masked"], moved["masked"])
    other = model([{**record, "file_name": "1.png"}])[0]["masked_image"]
    assert not torch.equal(first["masked"], other["masked"])
    assert torch.equal(first["image"], record["image"])
    seen = (first["masked"] == record["image"]).all(dim=0)
    # 25 units of 16 px and less at the border, of which 15 are masked, with the mean color.
    gray = torch.tensor(IMAGENET_MEAN).round().to(torch.uint8).view(3, 1)
    assert torch.equal(first["masked"][:, ~seen], gray.expand(3, int((~seen).sum())))
    assert torch.equal(first["reconstruction"][:, seen], record["image"][:, seen])
    assert 0.45 < float((~seen).float().mean()) < 0.75


def test_training_masks_are_random() -> None:
    model = MaskedPretraining(backbone=backbone())
    torch.manual_seed(0)
    losses = {model(batch(2))["loss_mim"].item() for _ in range(4)}
    assert len(losses) == 4


def test_the_schedule_is_that_of_timm() -> None:
    """Apart from the end of the warm-up, where ours is continuous."""
    from timm.scheduler import CosineLRScheduler

    schedule = Schedule(
        iterations=1000,
        decay="cosine",
        warmup_iterations=60,
        warmup_factor=1e-3,
        final_factor=0.01,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = CosineLRScheduler(
        optimizer, t_initial=1000, lr_min=0.01, warmup_t=60, warmup_lr_init=1e-3, t_in_epochs=False
    )
    factor = schedule.multiplier(100)
    for step in (0, 1, 20, 59, 60, 200, 500, 900, 999):
        expected = theirs._get_lr(step)[0]
        assert factor(step / 1000) == pytest.approx(expected, rel=0.01), step
    assert factor(0.5) == pytest.approx(theirs._get_lr(500)[0], rel=1e-6)


def test_weight_decay_of_vectors() -> None:
    model = ImageClassifier(backbone=backbone(), num_classes=CLASSES)
    groups = parameter_groups(
        model, lr=1.0, weight_decay=0.05, no_decay_names=("nothing",), decay_vectors=False
    )
    for group in groups:
        assert {p.ndim <= 1 for p in group["params"]} == {group["weight_decay"] == 0}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
