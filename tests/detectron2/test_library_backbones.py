"""Heads of this package on backbones of timm and Hugging Face, and what wrong configs say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("timm", reason="timm is missing: make install-tests")
pytest.importorskip("transformers", reason="transformers is missing: make install-tests")

from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from focalnet_det import add_focalnet_config
from focalnet_det.detectron2 import backbone
from focalnet_det.detectron2.library_backbones import (
    LibraryBackbone,
    huggingface_backbone,
    timm_backbone,
)
from focalnet_det.experiment import load_config
from tests.helpers.paths import CONFIGS

CONVNEXT = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
BACKBONES: dict[str, Callable[[], LibraryBackbone]] = {
    "timm_resnet": lambda: timm_backbone("resnet10t"),
    "timm_convnext": lambda: timm_backbone("test_convnext"),
    "huggingface_convnextv2": lambda: huggingface_backbone("convnextv2", **CONVNEXT),
    "huggingface_swin": lambda: huggingface_backbone("swin", **SWIN),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_size_has_the_features_of_a_padded_one(name: str) -> None:
    backbone = BACKBONES[name]().eval()
    shapes = backbone.output_shape()
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32]
    assert list(shapes) == ["stage1", "stage2", "stage3", "stage4"]
    image = torch.rand(1, 3, 70, 109)
    padded = nn.functional.pad(image, (0, 128 - 109, 0, 96 - 70))
    with torch.no_grad():
        features = backbone(image)
        raw = backbone.net(padded)
    # Of two maps with one stride, Hugging Face's stem and first stage, the later one counts.
    maps = list({m.shape[-2]: m for m in getattr(raw, "feature_maps", raw)}.values())[-4:]
    for (key, shape), theirs in zip(shapes.items(), maps, strict=True):
        height, width = -(-70 // shape.stride), -(-109 // shape.stride)
        assert features[key].shape == (1, shape.channels, height, width)
        torch.testing.assert_close(features[key], theirs[..., :height, :width])


def records(count: int = 2) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        instances = Instances((64, 96))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 60.0, 48.0]]))
        instances.gt_classes = torch.tensor([1])
        mask = torch.zeros(1, 64, 96, dtype=torch.bool)
        mask[:, 8:48, 8:60] = True
        instances.gt_masks = BitMasks(mask)
        labels = torch.zeros(64, 96, dtype=torch.int64)
        image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
        found.append({"image": image, "instances": instances, "sem_seg": labels})
    return found


# Config, where the backbone stands, overrides that make the head small.
HEADS = {
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py", True, []),
    "retinanet": ("COCO-Detection/retinanet_focalnet_nano_fpn_small.py", True, []),
    "upernet": (
        "ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py",
        False,
        ["model.channels=16", "model.train_size=[64,96]"],
    ),
    "panoptic_fpn": ("Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py", True, []),
    "mask2former": (
        "Shapes-SemanticSegmentation/mask2former_focalnet_nano_small.py",
        False,
        ["model.train_size=[64,96]"],
    ),
}


@pytest.mark.parametrize("library", ["timm_resnet", "huggingface_convnextv2"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_train_and_predict(head: str, library: str) -> None:
    config, has_neck, overrides = HEADS[head]
    model_config = load_config(CONFIGS / config, overrides).model
    built = BACKBONES[library]()
    backbone_config = model_config.pop("backbone")
    if has_neck:
        del backbone_config["bottom_up"]
        model = _build(model_config, backbone=_build(backbone_config, bottom_up=built))
    else:
        model = _build(model_config, backbone=built)
    with EventStorage():
        losses = model(records())
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    first = next(p for p in built.parameters() if p.requires_grad)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    with torch.no_grad():
        (found,) = model.eval()([{"image": torch.rand(3, 70, 45) * 255}])
    assert found


def _build(config: Any, **parts: nn.Module) -> nn.Module:
    target = config.pop("_target_")
    return target(**parts, **{key: instantiate(value) for key, value in config.items()})


def test_unknown_features_are_refused() -> None:
    with pytest.raises(ValueError, match="This backbone has no stage5; it has"):
        timm_backbone("resnet10t", out_features=["stage5"])


def bare(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_a_config_without_our_keys_is_explained() -> None:
    shape = type("Shape", (), {"channels": 3})()
    with pytest.raises(KeyError, match=r"call focalnet_det.add_focalnet_config\(cfg\) before"):
        BACKBONE_REGISTRY.get("build_focalnet_backbone")(bare("build_focalnet_backbone"), shape)


def test_a_c4_config_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = bare("build_focalnet_backbone")
    add_focalnet_config(cfg)
    cfg.MODEL.FOCALNET.VARIANT = "focalnet_nano"
    with pytest.raises(KeyError, match="no feature 'res4'; it has stage1.*Configs named C4"):
        build_model(cfg)
    warnings: list[str] = []
    monkeypatch.setattr(backbone.logger, "warning", lambda text, *a: warnings.append(text % a))
    cfg.MODEL.BACKBONE.NAME = "build_focalnet_fpn_backbone"
    with pytest.raises(KeyError):
        build_model(cfg)
    assert "MODEL.ROI_HEADS.NAME is Res5ROIHeads. Configs named C4" in warnings[0]
