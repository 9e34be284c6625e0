"""Masked image modeling against transformers' model, slow loops and worked-out numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from focalnet_det.backbones import FOCALNETS, VARIANTS, build_backbone
from focalnet_det.backbones.masked_images import MaskedImageModel, MaskGenerator, masked_l1
from focalnet_det.checkpoint import load_headed, load_pretrained
from tests.helpers.compare import relative_error
from tests.helpers.shrunk import NAMES, randomise, shrunk

SIZE = 192


def model(name: str, **overrides: Any) -> MaskedImageModel:
    net = MaskedImageModel(shrunk(name, output_norm=False, **overrides)).eval()
    return randomise(net)


def random_mask(net: MaskedImageModel, height: int, width: int, count: int = 2) -> Tensor:
    draw = MaskGenerator()
    masks = [draw(height, width, net.patch_size) for _ in range(count)]
    return torch.stack(masks)


def loss_of(net: MaskedImageModel, x: Tensor, mask: Tensor) -> Tensor:
    return masked_l1(net(x, mask), x, net.pixel_mask(mask, *x.shape[2:]))


@pytest.mark.parametrize("name", ["focalnet_tiny_lrf", "focalnet_large_fl4", "focalnet_huge_fl3"])
@torch.no_grad()
def test_equals_transformers(name: str) -> None:
    """Loss and reconstruction with the same weights, which pass through our layout table."""
    transformers = pytest.importorskip("transformers")
    row = FOCALNETS[name]
    config = transformers.FocalNetConfig(
        image_size=SIZE,
        embed_dim=8,
        depths=[1, 1, 2, 1],
        hidden_sizes=[16, 32, 64, 64],
        focal_levels=list(row.focal_levels),
        focal_windows=list(row.focal_windows),
        use_conv_embed=row.conv_embed,
        use_layerscale=row.layer_scale is not None,
        use_post_layernorm=row.post_norm,
        use_post_layernorm_in_modulation=row.post_norm_in_modulation,
        normalize_modulator=row.normalize_modulator,
    )
    theirs = transformers.FocalNetForMaskedImageModeling(config).eval().double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net = model(name).double()
    report = load_headed(net, theirs.state_dict(), new_classes=False)
    assert report.layout == "huggingface"
    assert report.missing == report.dropped == []
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.double)
    mask = random_mask(net, SIZE, SIZE)
    expected = theirs(x, bool_masked_pos=mask.flatten(1))
    assert relative_error(net(x, mask), expected.reconstruction) <= 1e-10
    # The reduction is in single precision.
    assert float(loss_of(net, x, mask)) == pytest.approx(float(expected.loss), rel=1e-6)


@torch.no_grad()
def test_loss_of_an_image_that_is_not_square_is_that_of_a_loop() -> None:
    net = model("focalnet_tiny_srf").double()
    x = torch.randn(2, 3, 160, 224, dtype=torch.double)
    mask = random_mask(net, 160, 224)
    # 5 x 7 units, of which 0.6, rounded up, are masked; 8 x 8 patches each.
    assert mask.shape == (2, 40, 56)
    assert mask.sum(dim=(1, 2)).tolist() == [21 * 64, 21 * 64]
    # Stem, token, stages, norm, 1x1 convolution and pixel shuffle, written out.
    backbone = net.backbone
    stem = torch.nn.functional.conv2d(
        x, backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias, stride=4
    )
    tokens = backbone.patch_embed.norm(stem.permute(0, 2, 3, 1))
    for n in range(2):
        for i in range(40):
            for j in range(56):
                if mask[n, i, j]:
                    tokens[n, i, j] = net.mask_token[0, 0]
    for layer in backbone.layers:
        tokens = layer(tokens)
        if layer.downsample is not None:
            tokens = layer.downsample(tokens.permute(0, 3, 1, 2))
    tokens = net.norm(tokens)
    weight, bias = net.decoder[0].weight[:, :, 0, 0], net.decoder[0].bias
    total, pixels = 0.0, 0
    for n in range(2):
        for i in range(40):
            for j in range(56):
                if not mask[n, i, j]:
                    continue
                values = weight @ tokens[n, i // 8, j // 8] + bias
                # Channel c, row r and column k of a cell are output c * 32 * 32 + r * 32 + k.
                cell = values.view(3, 32, 32)
                r, k = 4 * (i % 8), 4 * (j % 8)
                patch = x[n, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                total += float((cell[:, r : r + 4, k : k + 4] - patch).abs().sum())
                pixels += 16
    expected = total / (pixels + 1e-5) / 3
    assert float(loss_of(net, x, mask)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_learns_from_images_of_odd_sizes(name: str) -> None:
    """The loss depends on every parameter, and on masked pixels of the image alone."""
    net = model(name, drop_path_rate=0.0).train()
    x = torch.randn(1, 3, 70, 101)
    shape = net.mask_shape(70, 101)
    sides = (96, 128) if net.stride == 32 else (80, 112)
    assert shape == tuple(side // net.patch_size for side in sides)
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[:, :2, 2:] = True
    loss = loss_of(net, x, mask)
    loss.backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # On maps of one window there are no neighbors, whose table gets no gradient.
    assert [n for n in unused if "neighbors" not in n] == []
    if VARIANTS[name].conv_embed:
        return  # patches of the stem overlap, so those that are seen see a little of the others
    with torch.no_grad():
        seen = ~net.pixel_mask(mask, 70, 101)
        reconstruction = net(x, mask)
        hidden = torch.where(seen, x, 100.0)
        assert torch.equal(net(hidden, mask), reconstruction)
        changed = torch.where(seen, x + 1, x)
        assert not torch.equal(net(changed, mask), reconstruction)


def test_masks_are_random_units() -> None:
    draw = MaskGenerator(unit=32, ratio=0.6)
    masks = torch.stack([draw(192, 192, 4) for _ in range(300)])
    assert masks.shape == (300, 48, 48)
    units = masks.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)
    assert bool((units.all(-1) == units.any(-1)).all())
    counts = units.any(-1).flatten(1).sum(1)
    assert set(counts.tolist()) == {math.ceil(36 * 0.6)} == {22}
    # Each unit is masked about as often: 183 of 300, with a deviation of 8.4.
    often = units.any(-1).sum(0)
    assert 140 < int(often.min()) <= int(often.max()) < 226
    again = [draw(192, 192, 4, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)
    assert draw(33, 64, 4).shape == (16, 16)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        ("ratio in 0..1", lambda: MaskGenerator(ratio=0)),
        ("must be a multiple", lambda: MaskGenerator(unit=30)(64, 64, 4)),
        ("norm of its own", lambda: MaskedImageModel(build_backbone("focalnet_nano"))),
        (
            r"must be \(1, 16, 16\), got \(1, 8, 8\)",
            lambda: model("focalnet_nano")(torch.zeros(1, 3, 64, 64), torch.zeros(1, 8, 8) > 0),
        ),
    ],
)
def test_wrong_arguments_are_named(error: str, call: Any) -> None:
    with pytest.raises(ValueError, match=error):
        call()


def test_pretrained_weights_initialize_a_backbone_and_a_classifier() -> None:
    from tests.backbones.test_classifier import shrunk_classifier

    source = model("focalnet_tiny_srf")
    backbone = shrunk("focalnet_tiny_srf", focal_windows=(9, 9, 9, 9))
    report = load_pretrained(backbone, source.state_dict())
    assert report.share == 1
    assert set(report.rules.values()) == {
        "classifier", "token of masked image modeling", "decoder of masked image modeling",
    }  # fmt: skip
    net = shrunk_classifier("focalnet_tiny_srf")
    report = load_headed(net, source.state_dict())
    assert report.missing == ["head.weight", "head.bias"]
    assert torch.equal(net.norm.weight, source.norm.weight)
