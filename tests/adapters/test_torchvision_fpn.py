"""Backbones in torchvision's detectors."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet

from focalnet_det import create_backbone
from focalnet_det.adapters import torchvision_backbone

SMALL = {"embed_dim": 8, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}
DETECTORS: dict[str, tuple[type[nn.Module], str, list[str]]] = {
    "mask_rcnn": (MaskRCNN, "pool", ["0", "1", "2", "3", "pool"]),
    "retinanet": (RetinaNet, "p6p7", ["0", "1", "2", "p6", "p7"]),
    "fcos": (FCOS, "p6p7", ["0", "1", "2", "p6", "p7"]),
}


@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_train_and_predict(kind: str) -> None:
    build, top, levels = DETECTORS[kind]
    backbone = torchvision_backbone("focalnet_tiny_srf", top=top, out_channels=64, **SMALL)
    sizes = [tuple(level.shape) for level in backbone(torch.rand(1, 3, 64, 96)).values()]
    first = 2 if top == "pool" else 3
    assert sizes == [(1, 64, -(-64 // 2**k), -(-96 // 2**k)) for k in range(first, first + 5)]
    assert list(backbone(torch.rand(1, 3, 64, 96))) == levels
    model = build(backbone, num_classes=3, min_size=64, max_size=96)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 48.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 96, dtype=torch.uint8),
    }
    # The norms of FCOS want more than one value in a group.
    losses = model([torch.rand(3, 64, 96)], [target])
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    stem = model.backbone.body.patch_embed.proj.weight
    assert stem.grad is not None
    assert stem.grad.abs().sum() > 0
    found = model.eval()([torch.rand(3, 70, 45)])[0]
    assert {"boxes", "scores", "labels"} <= set(found)


def test_weights_are_those_of_the_backbone(tmp_path) -> None:
    source = create_backbone("focalnet_tiny_srf", **SMALL)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    adapted = torchvision_backbone("focalnet_tiny_srf", weights=tmp_path / "weights.pth", **SMALL)
    loaded = adapted.body.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


def test_unknown_top_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown top 'p5'. Known: pool, p6p7"):
        torchvision_backbone("focalnet_nano", top="p5")
