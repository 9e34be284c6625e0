"""Our backbones inside models of transformers, from configs alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")

import transformers

from focalnet_det import create_backbone, list_backbones
from focalnet_det.huggingface import FocalBackbone, FocalBackboneConfig

SMALL = {"embed_dim": 8, "depths": [1, 1, 1, 1], "drop_path_rate": 0.0}


def small_config(**options: Any) -> FocalBackboneConfig:
    return FocalBackboneConfig(variant="focalnet_tiny_lrf", overrides=SMALL, **options)


@torch.no_grad()
def test_features_have_our_names_strides_and_values(tmp_path: Path) -> None:
    model = transformers.AutoBackbone.from_config(small_config()).eval()
    assert isinstance(model, FocalBackbone)
    assert model.out_features == ["stage1", "stage2", "stage3", "stage4"]
    assert model.channels == [8, 16, 32, 64]
    x = torch.randn(1, 3, 97, 131)
    maps = model(x).feature_maps
    # 97 x 131 at strides 4, 8, 16 and 32, rounded up.
    assert [tuple(m.shape[2:]) for m in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]
    net = create_backbone("focalnet_tiny_lrf", **SMALL).eval()
    net.load_state_dict(model.network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(maps, net(x).values(), strict=True))
    model.save_pretrained(tmp_path)
    again = FocalBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage4"])
    assert again.channels == [16, 64]
    chosen = again.eval()(x, return_dict=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(chosen, [maps[1], maps[3]], strict=True))


@pytest.mark.parametrize("name", list_backbones("*"))
def test_every_variant_has_a_config(name: str) -> None:
    config = FocalBackboneConfig(variant=name)
    stages = ["stage3"] if "iso" in name else ["stage1", "stage2", "stage3", "stage4"]
    assert config.stage_names == config.out_features == stages
    again = FocalBackboneConfig.from_dict(config.to_dict())
    assert (again.variant, again.out_features) == (name, stages)


def test_unknown_features_and_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="out_features must be a subset"):
        small_config(out_features=["stage5"])
    with pytest.raises(KeyError, match="Unknown variant"):
        FocalBackboneConfig(variant="focalnet_tiny")


def changed_by_a_step(model: Any, loss: torch.Tensor) -> bool:
    """Whether a step on the loss changes every parameter of the backbone that has a gradient."""
    backbone = next(m for m in model.modules() if isinstance(m, FocalBackbone))
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.backward()
    assert all(p.grad is not None for p in backbone.parameters())
    optimizer.step()
    return any(not torch.equal(before[n], p) for n, p in backbone.named_parameters())


def test_upernet_of_transformers_trains(tmp_path: Path) -> None:
    config = transformers.UperNetConfig(
        backbone_config=small_config(),
        hidden_size=16,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        num_labels=3,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    labels = torch.randint(3, (2, 64, 96))
    output = model(pixel_values=torch.randn(2, 3, 64, 96), labels=labels)
    assert output.logits.shape == (2, 3, 64, 96)
    assert changed_by_a_step(model, output.loss)
    # The whole model is saved and read like any other, our backbone by its model type.
    model.eval().save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_mask2former_of_transformers_trains() -> None:
    config = transformers.Mask2FormerConfig(
        backbone_config=small_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        num_labels=3,
        train_num_points=64,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    masks = [torch.zeros(2, 64, 96) for _ in range(2)]
    for mask in masks:
        mask[0, :32], mask[1, 32:] = 1, 1
    output = model(
        pixel_values=torch.randn(2, 3, 64, 96),
        mask_labels=masks,
        class_labels=[torch.tensor([0, 2])] * 2,
    )
    assert output.masks_queries_logits.shape == (2, 5, 16, 24)
    assert changed_by_a_step(model, output.loss)
