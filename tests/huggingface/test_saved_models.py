"""Folders of transformers, written and read here and there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is a test dependency")

import transformers

from focalnet_det.backbones import FocalNet
from focalnet_det.backbones.classifier import Classifier
from focalnet_det.backbones.masked_images import MaskedImageModel, MaskGenerator, masked_l1
from focalnet_det.huggingface import load_huggingface, save_huggingface
from tests.backbones.test_classifier import shrunk_classifier
from tests.backbones.test_masked_images import model as masked_model
from tests.helpers.compare import relative_error
from tests.helpers.shrunk import shrunk

NAMES = ["focalnet_tiny_lrf", "focalnet_large_fl4", "focalnet_huge_fl3"]


def same(net: nn.Module, other: nn.Module) -> bool:
    first, second = net.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", [*NAMES, "focalnet_base_iso"])
@torch.no_grad()
def test_classifiers(name: str, tmp_path: Path) -> None:
    depths = (2,) if "iso" in name else (1, 1, 2, 1)
    net = shrunk_classifier(name, 3, depths=depths)
    save_huggingface(net, tmp_path / "ours", class_names=["ant", "bee", "cat"])
    theirs, info = transformers.FocalNetForImageClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(net(x), theirs.eval()(x).logits) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_huggingface(tmp_path / "theirs").eval()
    assert isinstance(again, Classifier)
    assert same(again, net)
    assert relative_error(again(x), net(x)) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_masked_image_models(name: str, tmp_path: Path) -> None:
    net = masked_model(name)
    save_huggingface(net, tmp_path / "ours", image_size=64)
    theirs = transformers.FocalNetForMaskedImageModeling.from_pretrained(tmp_path / "ours").eval()
    x = torch.randn(2, 3, 64, 64)
    mask = torch.stack([MaskGenerator(unit=16)(64, 64, 4) for _ in range(2)])
    expected = theirs(x, bool_masked_pos=mask.flatten(1))
    found = net(x, mask)
    assert relative_error(found, expected.reconstruction) <= 1e-5
    loss = masked_l1(found, x, net.pixel_mask(mask, 64, 64))
    assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_huggingface(tmp_path / "theirs")
    assert isinstance(again, MaskedImageModel)
    assert same(again, net)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_backbones(name: str, tmp_path: Path) -> None:
    """Of transformers, stage 1 to 3 follow the downsampling of ours, and stage 4 is ours."""
    net = shrunk(name, output_norm=False)
    save_huggingface(net, tmp_path / "ours")
    theirs, info = transformers.FocalNetBackbone.from_pretrained(
        tmp_path / "ours", out_features=["stage1", "stage4"], output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    x = torch.randn(1, 3, 64, 96)
    maps, features = theirs.eval()(x).feature_maps, net(x)
    downsampled = net.layers[0].downsample(features["stage1"]).permute(0, 3, 1, 2)
    assert relative_error(downsampled, maps[0]) <= 1e-5
    assert relative_error(features["stage4"], maps[1]) <= 1e-5
    assert theirs.channels == [maps[0].shape[1], maps[1].shape[1]]
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_huggingface(tmp_path / "theirs")
    assert isinstance(again, FocalNet)
    assert same(again, net)


@pytest.mark.parametrize(
    ("error", "build"),
    [
        ("output norms", lambda: shrunk("focalnet_tiny_srf")),
        ("stem_padding", lambda: shrunk("focalnet_large_fl3", output_norm=False, stem_padding=3)),
        ("FocalNets only", lambda: shrunk("focal_tiny", output_norm=False)),
    ],
)
def test_what_transformers_cannot_express_is_named(error: str, build: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        save_huggingface(build(), tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(ValueError, match="holds a swin"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "focalnet", "hidden_act": "relu"})
    )
    with pytest.raises(ValueError, match="hidden_act must be gelu"):
        load_huggingface(tmp_path)
