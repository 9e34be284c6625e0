"""Outputs after loading the state dicts of timm's and transformers' own models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from focalnet_det import create_backbone
from focalnet_det.backbones import FOCALNETS, FocalNet
from focalnet_det.checkpoint import (
    convert_checkpoint,
    convert_state_dict,
    inspect_checkpoint,
    load_pretrained,
    read_state_dict,
    write_state_dict,
)
from tests.helpers.compare import relative_error

timm_focalnet = pytest.importorskip("timm.models.focalnet", reason="timm is a test dependency")
transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is a test dependency")

NAMES = [n for n in sorted(FOCALNETS) if n.endswith(("srf", "lrf", "fl3", "fl4"))]
# Odd sizes where the other library pads as the official detection code does.
SIZES = [(64, 64), (97, 131)]


def randomise(net: nn.Module) -> nn.Module:
    """Every parameter matters, and 24 post-normalised blocks still do not amplify rounding."""
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if "gamma" in name:
            nn.init.uniform_(parameter, 0.05, 0.2)
        elif parameter.ndim == 1:
            nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net.eval()


def timm_model(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """timm's class with timm's flags, narrow, and 7 classes."""
    with monkeypatch.context() as patch:
        patch.setattr(timm_focalnet, "_create_focalnet", lambda _, pretrained, **flags: flags)
        flags = getattr(timm_focalnet, name)()
    # The one flag in which timm differs from the official file; see tests/backbones/test_timm.py.
    flags["normalize_modulator"] = FOCALNETS[name].normalize_modulator
    return randomise(timm_focalnet.FocalNet(num_classes=7, **flags | {"embed_dim": 12}))


def huggingface_config(name: str, width: int = 12, **changes: Any) -> Any:
    row = FOCALNETS[name]
    return transformers.FocalNetConfig(
        image_size=64,
        patch_size=row.patch_size,
        embed_dim=width,
        use_conv_embed=row.conv_embed,
        hidden_sizes=[2 * width, 4 * width, 8 * width, 8 * width],
        depths=list(row.depths),
        focal_levels=list(row.focal_levels),
        focal_windows=list(row.focal_windows),
        use_layerscale=row.layer_scale is not None,
        use_post_layernorm=row.post_norm,
        use_post_layernorm_in_modulation=row.post_norm_in_modulation,
        normalize_modulator=row.normalize_modulator,
        num_labels=7,
        **changes,
    )


TOLERANCE = 1e-10


def loaded(name: str, weights: Any) -> FocalNet:
    net = create_backbone(name, embed_dim=12, output_norm=False)
    assert load_pretrained(net, weights).share == 1.0
    # Random blocks, 24 of them, magnify single precision's rounding to 1e-5: enough to hide
    # nothing, but to fail by chance.
    return net.double().eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_after_loading_timms_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = timm_model(name, monkeypatch)
    path = tmp_path / "model.safetensors"
    safetensors.save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, path)
    found = inspect_checkpoint(path)
    assert (found.layout, found.classes) == ("timm", 7)
    net = loaded(name, path)
    x = torch.randn(2, 3, 64, 96).double()
    expected = theirs.double().forward_intermediates(x, intermediates_only=True)
    for ours, feature in zip(net(x).values(), expected, strict=True):
        assert relative_error(ours, feature) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_after_loading_transformers_file(name: str, tmp_path: Path) -> None:
    """Its stage k is our stage k and the downsampling after it."""
    theirs = randomise(transformers.FocalNetForImageClassification(huggingface_config(name)))
    theirs.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert (found.layout, found.classes) == ("huggingface", 7)
    net = loaded(name, tmp_path)
    model = theirs.focalnet.double()
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width).double()
        output = model(x, output_hidden_states=True)
        states = output.reshaped_hidden_states
        features = list(net(x).values())
        stem = net.patch_embed(x).permute(0, 3, 1, 2)
        assert relative_error(stem, states[0]) <= TOLERANCE
        for i in range(3):
            downsampled = net.layers[i].downsample(features[i]).permute(0, 3, 1, 2)
            assert relative_error(downsampled, states[i + 1]) <= TOLERANCE
        assert relative_error(features[3], states[4]) <= TOLERANCE
        last = model.layernorm(features[3].flatten(2).transpose(1, 2))
        assert relative_error(last, output.last_hidden_state) <= TOLERANCE


@torch.no_grad()
def test_backbone_class_of_transformers(tmp_path: Path) -> None:
    config = huggingface_config("focalnet_tiny_lrf", out_features=["stem", "stage1", "stage4"])
    theirs = randomise(transformers.FocalNetBackbone(config))
    net = loaded("focalnet_tiny_lrf", theirs.state_dict())
    x = torch.randn(1, 3, 64, 64).double()
    maps = theirs.double()(x).feature_maps
    ours = net(x)
    assert relative_error(ours["stage4"], maps[2]) <= TOLERANCE
    down = net.layers[0].downsample(ours["stage1"]).permute(0, 3, 1, 2)
    assert relative_error(down, maps[1]) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_written_files_load_in_the_libraries(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers reads our folder, config included; timm reads our names, strictly."""
    source = timm_model(name, monkeypatch)
    x = torch.randn(1, 3, 64, 64)
    expected = source(x)
    conversion = convert_checkpoint(source.state_dict(), tmp_path, "huggingface")
    assert conversion.dropped == {}
    model = transformers.FocalNetForImageClassification.from_pretrained(tmp_path).eval()
    if name == "focalnet_large_fl4":
        # At 12 channels it is no published row, whose flag the config would carry.
        for module in model.modules():
            if hasattr(module, "normalize_modulator"):
                module.normalize_modulator = True
    assert relative_error(model(x).logits, expected) <= 1e-5
    twin = timm_model(name, monkeypatch)
    for parameter in twin.parameters():
        parameter.zero_()
    back = convert_state_dict(model.state_dict(), "timm")
    twin.load_state_dict(back.tensors, strict=True)
    assert torch.equal(twin(x), expected)


def test_config_of_transformers_for_true_sizes() -> None:
    from focalnet_det.checkpoint.convert import huggingface_config as written

    with torch.device("meta"):
        net = create_backbone("focalnet_large_fl4", output_norm=False)
    config = transformers.FocalNetConfig(**written(net.state_dict()))
    expected = huggingface_config("focalnet_large_fl4", width=192)
    for field in ("hidden_sizes", "normalize_modulator", "use_post_layernorm", "focal_windows"):
        assert getattr(config, field) == getattr(expected, field)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_safetensors_as_the_library_has_them(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "b.odd": (torch.randn(3, 5) > 0).to(dtype),
        "a": torch.arange(7).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "single": torch.randn(2, 2),
    }
    write_state_dict(tmp_path / "ours.safetensors", tensors)
    safetensors.save_file(tensors, tmp_path / "theirs.safetensors")
    for read in (
        safetensors.load_file(tmp_path / "ours.safetensors"),
        read_state_dict(tmp_path / "theirs.safetensors"),
        read_state_dict(tmp_path / "ours.safetensors"),
    ):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
