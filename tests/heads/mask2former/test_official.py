"""Every intermediate result of Mask2Former against stored outputs of the official code."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import Backbone
from torch import Tensor
from torch.nn import functional as F

from focalnet_det.heads.mask2former import Mask2Former
from focalnet_det.heads.mask2former.mask_matcher import Target
from focalnet_det.heads.mask2former.transformer_decoder import Prediction, attention_mask
from tests.helpers import official_mask2former as case

POINTS = case.PADDED[0] * case.PADDED[1]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    found = case.official_parts(points=POINTS)
    found["criterion"].oversampling, found["criterion"].uncertain = 1.0, 0.0
    return found


@pytest.fixture(scope="module")
def features() -> dict[str, Tensor]:
    return {name: x.requires_grad_() for name, x in case.features().items()}


@pytest.fixture(scope="module")
def predictions(parts: dict[str, Any], features: dict[str, Tensor]) -> list[Prediction]:
    found: list[Prediction] = parts["sem_seg_head"](features)
    return found


@pytest.fixture
def at_pixel_centers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are those of the stored case in place of random ones."""
    height, width = case.PADDED
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack(((x + 0.5) / width, (y + 0.5) / height), dim=-1).reshape(1, -1, 2)
    monkeypatch.setattr(torch, "rand", lambda n, *_, **__: grid.expand(n, -1, -1))


def targets() -> list[Target]:
    numbers, arrays = case.stored()
    found = []
    for i in range(2):
        shape = numbers["cases"]["semantic"][f"target_image{i}_masks_shape"]
        packed = arrays[f"semantic/target/image{i}/masks_packed"].numpy()
        masks = np.unpackbits(packed)[: np.prod(shape)].reshape(shape).astype(bool)
        labels = arrays[f"semantic/target/image{i}/labels"].long()
        found.append(Target(labels, torch.from_numpy(masks)))
    return found


def assert_stored(name: str, value: Tensor) -> None:
    actual, expected, bar = case.sampled(name, value.detach())
    assert (actual - expected).abs().max() <= bar, name


def test_pixel_decoder(parts: dict[str, Any], features: dict[str, Tensor]) -> None:
    pixels = parts["sem_seg_head"].pixel_decoder(features)
    assert_stored("mask_features", pixels.mask_features)
    for i, level in enumerate(pixels.levels):
        assert_stored(f"multi_scale_{i}", level)


def test_classes_and_masks_of_every_layer(predictions: list[Prediction]) -> None:
    assert len(predictions) == 10
    for i, prediction in enumerate(predictions):
        assert_stored(f"semantic/layer{i}/class_logits", prediction.class_logits)
        assert_stored(f"layer{i}/mask_logits", prediction.mask_logits())


def test_attention_masks_of_every_layer(predictions: list[Prediction]) -> None:
    numbers, _ = case.stored()
    for i, prediction in enumerate(predictions):
        size = case.SIZES[:0:-1][i % 3]
        resized = F.interpolate(prediction.mask_features, size=size, mode="bilinear")
        blocked = attention_mask(prediction.mask_embedding, resized)
        # What was blocked everywhere is open; the stored counts are of the masks before.
        opened = numbers["attn_mask_all_true_rows"][i]
        assert not blocked.all(-1).any()
        whole = F.interpolate(prediction.mask_logits(), size=size, mode="bilinear")
        before = whole.sigmoid().flatten(2) < 0.5
        assert before.all(-1).sum() == opened
        assert blocked.sum() + opened * size[0] * size[1] == numbers["attn_mask_true"][i]


@pytest.mark.usefixtures("at_pixel_centers")
def test_matching_losses_and_gradients(
    parts: dict[str, Any], features: dict[str, Tensor], predictions: list[Prediction]
) -> None:
    numbers, _ = case.stored()
    stored = numbers["cases"]["semantic"]
    criterion, head = parts["criterion"], parts["sem_seg_head"]
    for i, images in enumerate(criterion.matcher(predictions, targets(), case.PADDED)):
        name = "final" if i == 9 else f"layer{i}"
        expected = stored["matching_grid"][name]
        assert [[q.tolist(), s.tolist()] for q, s in images] == expected, name
    losses = criterion(predictions, targets(), case.PADDED)
    weights = {"ce": 2, "mask": 5, "dice": 5}
    assert set(losses) == set(stored["loss_grid"])
    for name, expected in stored["loss_grid"].items():
        unweighted = losses[name].item() / weights[name.split("_")[1]]
        assert unweighted == pytest.approx(expected, rel=2e-5), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(stored["total_grid"], rel=1e-5)
    total.backward(retain_graph=True)
    for name, parameter in head.named_parameters():
        expected = stored["grad_norm"][f"sem_seg_head.{name}"]
        # Gradients of locations jump at whole pixels; the stored noise of features is 1e-3.
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=5e-3, abs=1e-4), name
    for name, x in features.items():
        assert x.grad is not None
        assert_stored(f"semantic/grad/{name}", x.grad)
    head.zero_grad()


class StoredFeatures(Backbone):
    """The features of the case, whatever the images."""

    def forward(self, _: Tensor) -> dict[str, Tensor]:
        return case.features()

    def output_shape(self) -> dict[str, Any]:
        return case.input_shape()


@pytest.mark.parametrize("first", [False, True])
def test_semantic_inference(parts: dict[str, Any], first: bool) -> None:
    model = Mask2Former(backbone=StoredFeatures(), **parts, resize_masks_first=first).eval()
    records = [
        {"image": torch.zeros(3, 128, 160), "height": 128, "width": 160},
        {"image": torch.zeros(3, 100, 150), "height": 75, "width": 113},
    ]
    with torch.no_grad():
        results = model(records)
    # The name says whether scores are summed before or after masks are resized.
    order = "after" if first else "before"
    for i, result in enumerate(results):
        assert_stored(f"semantic/infer/image{i}/{order}_resize", result["sem_seg"])
