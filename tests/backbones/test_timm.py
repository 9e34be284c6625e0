"""Features against timm's FocalNet, its own flags and full depth, with copied weights."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from focalnet_det import create_backbone
from focalnet_det.backbones import VARIANTS, FocalNet
from tests.helpers.compare import relative_error
from tests.helpers.shrunk import randomise

timm_focalnet = pytest.importorskip("timm.models.focalnet", reason="timm is a test dependency")

NAMES = [
    f"focalnet_{size}_{form}"
    for sizes, forms in (
        (("tiny", "small", "base"), ("srf", "lrf")),
        (("large", "xlarge", "huge"), ("fl3", "fl4")),
    )
    for size in sizes
    for form in forms
]
OVERLAPPING = [name for name in NAMES if "fl" in name]
# Narrow for speed; each size keeps a width of its own.
WIDTHS = {"tiny": 12, "small": 12, "base": 16, "large": 12, "xlarge": 16, "huge": 20}


def timm_flags(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Constructor arguments that timm gives its own class for a variant."""
    with monkeypatch.context() as patch:
        patch.setattr(timm_focalnet, "_create_focalnet", lambda _, pretrained, **flags: flags)
        return getattr(timm_focalnet, name)()


def timm_name(name: str, post_norm: bool) -> str:
    """Name in timm of one of our parameters."""
    name = name.replace("patch_embed.", "stem.").replace("modulation.ln.", "modulation.norm.")
    # timm downsamples at the start of a stage, the official code and ours at the end.
    name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
    name = re.sub(r"gamma_(\d)", r"ls\1.gamma", name)
    return re.sub(r"\.norm([12])\.", r".norm\1_post.", name) if post_norm else name


def copy_weights(net: FocalNet, other: nn.Module, post_norm: bool) -> None:
    """Copies every weight into a timm model, which has 1x1 convolutions instead of linears."""
    target = {
        name: value
        for name, value in other.state_dict().items()
        if not name.startswith(("head.", "norm."))
    }
    source = {timm_name(name, post_norm): value for name, value in net.state_dict().items()}
    assert source.keys() == target.keys()
    for name, value in source.items():
        assert value.squeeze().shape == target[name].squeeze().shape, name
        target[name].copy_(value.reshape(target[name].shape))


def timm_features(other: nn.Module, x: Tensor) -> list[Tensor]:
    """Output of each stage before any norm, as ``features_only`` returns it."""
    return other.forward_intermediates(x, intermediates_only=True)


def pair(
    name: str, monkeypatch: pytest.MonkeyPatch, **overrides: Any
) -> tuple[FocalNet, nn.Module]:
    width = WIDTHS[name.split("_")[1]]
    net = randomise(create_backbone(name, embed_dim=width, output_norm=False, **overrides)).eval()
    for key, parameter in net.named_parameters():
        if "gamma" in key:
            # Larger branches make 24 post-normalised blocks amplify rounding errors.
            parameter.data.mul_(0.2)
    flags = timm_flags(name, monkeypatch)
    other = timm_focalnet.FocalNet(num_classes=0, **flags | {"embed_dim": width}).eval()
    copy_weights(net, other, flags.get("use_post_norm", False))
    return net, other


@pytest.mark.parametrize("name", NAMES)
def test_width_and_depth_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests below narrow both networks; their true sizes are equal too."""
    flags, row = timm_flags(name, monkeypatch), VARIANTS[name]
    assert (row.embed_dim, row.depths) == (flags["embed_dim"], tuple(flags["depths"]))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # timm's row of large_fl4 lacks the flag of the official yaml file; see the next test.
    overrides = {"normalize_modulator": False} if name == "focalnet_large_fl4" else {}
    net, other = pair(name, monkeypatch, **overrides)
    x = torch.randn(2, 3, 64, 96)
    features = net(x)
    theirs = timm_features(other, x)
    assert list(features) == ["stage1", "stage2", "stage3", "stage4"]
    for ours, expected in zip(features.values(), theirs, strict=True):
        assert relative_error(ours, expected) <= 1e-5
    # In double precision what is left is no difference of definition.
    x, net, other = x.double(), net.double(), other.double()
    for ours, expected in zip(net(x).values(), timm_features(other, x), strict=True):
        assert relative_error(ours, expected) <= 1e-12


@torch.no_grad()
def test_large_fl4_differs_by_its_modulator_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official yaml divides by L+1, timm does not, and no tensor shape shows it."""
    net, other = pair("focalnet_large_fl4", monkeypatch)
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(net(x).values(), timm_features(other, x), strict=True):
        assert relative_error(ours, theirs) > 1e-2
    for module in other.modules():
        if isinstance(module, timm_focalnet.FocalModulation):
            module.normalize_modulator = True
    for ours, theirs in zip(net(x).values(), timm_features(other, x), strict=True):
        assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OVERLAPPING])
@torch.no_grad()
def test_timm_drops_border_pixels_that_ours_pads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without overlap, timm at 97x131 is any code at 96x128; ours sees the last row and columns."""
    net, other = pair(name, monkeypatch)
    x = torch.randn(1, 3, 97, 131)
    theirs = timm_features(other, x)
    assert [tuple(f.shape[2:]) for f in theirs] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    for ours, expected in zip(net(x[:, :, :96, :128]).values(), theirs, strict=True):
        assert relative_error(ours, expected) <= 1e-5
    features = net(x)
    assert [tuple(f.shape[2:]) for f in features.values()] == [(25, 33), (13, 17), (7, 9), (4, 5)]
    changed = x.clone()
    changed[:, :, -1] += 1
    assert torch.equal(timm_features(other, changed)[0], theirs[0])
    assert not torch.equal(net(changed)["stage1"][:, :, -1], features["stage1"][:, :, -1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_stem_pads_with_zeros_at_the_right_and_bottom(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At odd sizes our stem is timm's on an image padded to a multiple of 4, overlap or not."""
    net, other = pair(name, monkeypatch)
    x = torch.randn(1, 3, 97, 131)
    expected = other.stem(nn.functional.pad(x, (0, 1, 0, 3)))
    assert relative_error(net.patch_embed(x).permute(0, 3, 1, 2), expected) <= 1e-5


@pytest.mark.parametrize("name", ["focalnet_huge_fl4"])
@torch.no_grad()
def test_the_stem_padding_of_the_official_detection_file_differs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights were made with padding 2, as in timm; the detection file samples one pixel off."""
    net, other = pair(name, monkeypatch, stem_padding=3)
    x = torch.randn(1, 3, 64, 64)
    ours = net.patch_embed(x).permute(0, 3, 1, 2)
    assert relative_error(ours, other.stem(x)) > 0.1
    other.stem.proj.padding = (3, 3)
    assert relative_error(ours, other.stem(x)) <= 1e-5
