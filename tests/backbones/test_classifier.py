"""Classifiers against timm's and transformers', official names and sizes, and heads of 22k."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from focalnet_det import create_backbone, create_classifier
from focalnet_det.backbones import FOCALNETS, VARIANTS
from focalnet_det.backbones.classifier import Classifier
from focalnet_det.checkpoint import inspect_checkpoint, load_headed, load_initial_weights
from tests.backbones.test_focal_transformer import CLASSIFIERS
from tests.backbones.test_focal_transformer import OFFICIAL as FOCAL_TRANSFORMERS
from tests.backbones.test_timm import NAMES, timm_flags
from tests.backbones.test_variants import OFFICIAL
from tests.helpers.compare import relative_error
from tests.helpers.published import official_shapes, to_huggingface, to_timm
from tests.helpers.shrunk import randomise

timm_focalnet = pytest.importorskip("timm.models.focalnet", reason="timm is a test dependency")
DEPTHS = (1, 1, 2, 1)

# Parameters with a head of 21842 classes.
# Source: the official classes of microsoft/FocalNet:classification/focalnet.py at commit e8514bd.
HEADS_22K = {
    "focalnet_tiny_srf": 44_454_614,
    "focalnet_tiny_lrf": 44_675_426,
    "focalnet_small_srf": 65_918_714,
    "focalnet_small_lrf": 66_369_938,
    "focalnet_base_srf": 109_511_194,
    "focalnet_base_lrf": 110_112_818,
    "focalnet_large_fl3": 239_134_898,
    "focalnet_large_fl4": 239_315_402,
    "focalnet_xlarge_fl3": 408_787_378,
    "focalnet_xlarge_fl4": 409_028_042,
    "focalnet_huge_fl3": 745_276_338,
    "focalnet_huge_fl4": 747_989_578,
}


def shrunk_classifier(name: str, classes: int = 7, **overrides: Any) -> Classifier:
    net = create_classifier(name, classes, **{"embed_dim": 8, "depths": DEPTHS, **overrides})
    randomise(net)
    return net.eval()


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", [*OFFICIAL, *CLASSIFIERS])
def test_parameters_are_the_published_number(name: str) -> None:
    with torch.device("meta"):
        net = create_classifier(name)
        large = create_classifier(name, 21842) if name in HEADS_22K else None
    if name in OFFICIAL:
        assert count(net) == OFFICIAL[name][1]
    else:
        # Built for 224, the official stage 4 has no neighbors, and so no table for them.
        head = 1000 * net.head.in_features + 1000 + 2 * net.head.in_features
        assert count(net) == FOCAL_TRANSFORMERS[name][0] + head >= CLASSIFIERS[name]
    assert large is None or count(large) == HEADS_22K[name]


@pytest.mark.parametrize("name", [n for n in FOCALNETS if n != "focalnet_nano"])
def test_names_are_the_official_ones(name: str) -> None:
    width = 8
    depths = VARIANTS[name].depths
    with torch.device("meta"):
        net = create_classifier(name, 5, embed_dim=width, depths=depths)
    found = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert found == official_shapes(name, width=width, classes=5)
    assert net.load_state_dict(net.state_dict(), assign=True).missing_keys == []


@torch.no_grad()
def timm_logits(
    name: str, state: dict[str, Tensor], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    flags = timm_flags(name, monkeypatch) | {"embed_dim": 8, "depths": DEPTHS}
    if name == "focalnet_large_fl4":  # timm's row lacks the flag of the official yaml file
        flags["normalize_modulator"] = True
    other = timm_focalnet.FocalNet(num_classes=7, **flags).eval().to(x.dtype)
    other.load_state_dict(to_timm(state))
    return other(x)


@torch.no_grad()
def transformers_logits(name: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers")
    row = FOCALNETS[name]
    config = transformers.FocalNetConfig(
        embed_dim=8,
        depths=list(DEPTHS),
        hidden_sizes=[16, 32, 64, 64],
        focal_levels=list(row.focal_levels),
        focal_windows=list(row.focal_windows),
        use_conv_embed=row.conv_embed,
        use_layerscale=row.layer_scale is not None,
        use_post_layernorm=row.post_norm,
        use_post_layernorm_in_modulation=row.post_norm_in_modulation,
        normalize_modulator=row.normalize_modulator,
        num_labels=7,
    )
    other = transformers.FocalNetForImageClassification(config).eval().to(x.dtype)
    other.load_state_dict(to_huggingface(state))
    return other(x).logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_timm_and_transformers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = shrunk_classifier(name).double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    with torch.no_grad():
        logits = net(x)
    assert logits.std() > 0.05
    state = net.state_dict()
    for theirs in (timm_logits(name, state, x, monkeypatch), transformers_logits(name, state, x)):
        assert relative_error(logits, theirs) <= 1e-10


@pytest.mark.parametrize("name", ["focalnet_tiny_lrf", "focalnet_huge_fl4", "focalnet_small_iso"])
@pytest.mark.parametrize("layout", [dict, to_timm, to_huggingface])
def test_files_of_other_libraries_load(name: str, layout: Any) -> None:
    depths = DEPTHS if "iso" not in name else (2,)
    net, again = (shrunk_classifier(name, depths=depths) for _ in range(2))
    report = load_headed(again, layout(net.state_dict()), new_classes=False)
    assert report.missing == report.dropped == []
    for key, value in again.state_dict().items():
        assert torch.equal(value, net.state_dict()[key]), key


def test_a_head_for_other_classes_begins_anew_or_is_refused() -> None:
    source, net = shrunk_classifier("focalnet_tiny_srf"), shrunk_classifier("focalnet_tiny_srf", 3)
    before = net.head.weight.clone()
    with pytest.raises(ValueError, match=r"head.weight is \(7, 64\) in the file, \(3, 64\)"):
        load_headed(net, source.state_dict(), new_classes=False)
    report = load_headed(net, source.state_dict())
    assert set(report.rules.values()) == {"another number of classes"}
    assert report.missing == ["head.weight", "head.bias"]
    assert torch.equal(net.head.weight, before)
    assert torch.equal(net.norm.weight, source.norm.weight)
    headless = {k: v for k, v in source.state_dict().items() if not k.startswith("head")}
    with pytest.raises(ValueError, match="head.weight is not in the file"):
        load_headed(net, headless, new_classes=False)


def test_1000_classes_take_the_first_of_a_22k_head() -> None:
    source = shrunk_classifier("focalnet_large_fl3", 21842)
    net = create_classifier(
        "focalnet_large_fl3", weights=source.state_dict(), embed_dim=8, depths=DEPTHS
    ).eval()
    report = load_headed(net, source.state_dict(), new_classes=False)
    assert "Class 850" in report.notes[-1]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(net(x), source(x)[:, :1000]) <= 1e-6


def test_a_saved_classifier_initializes_a_backbone_and_a_detector(tmp_path: Path) -> None:
    """As it is: kernels grow, output norms are new, and the report says so."""
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    from focalnet_det.detectron2.backbone import focalnet_backbone
    from focalnet_det.necks.fpn import build_fpn

    net = shrunk_classifier("focalnet_tiny_srf")
    path = tmp_path / "model_final.pth"
    torch.save({"model": net.state_dict(), "iteration": 9}, path)
    assert "classifier (7 classes)" in inspect_checkpoint(path).architecture
    detector = nn.Module()
    bottom_up = focalnet_backbone(
        "focalnet_tiny_srf", embed_dim=8, depths=DEPTHS, focal_windows=(9, 9, 9, 9)
    )
    detector.backbone = build_fpn(bottom_up, out_channels=8)
    report = load_initial_weights(detector, path)
    assert report.share == 1
    assert all(".focal_layers." in name for name in report.resized)
    assert sorted(report.missing) == sorted(
        f"norm{i}.{part}" for i in range(4) for part in ("weight", "bias")
    )
    expected = create_backbone(
        "focalnet_tiny_srf", embed_dim=8, depths=DEPTHS, output_norm=False
    ).eval()
    expected.load_state_dict(net.backbone.state_dict())
    bottom_up.eval().output_norm = False
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = bottom_up(x)
        for name, feature in expected(x).items():
            assert relative_error(features[name], feature) <= 1e-5
