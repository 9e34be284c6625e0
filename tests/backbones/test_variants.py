"""Exact sizes and costs of every published variant, at full size on the meta device."""

import functools

import pytest
import torch

from focalnet_det import create_backbone
from focalnet_det.analysis import analyze_backbone
from focalnet_det.backbones import FOCALNETS, FocalNet

# Parameters with a final norm and without a head, parameters with a 1000-class head, GMACs at 224.
# Source: the official classes of microsoft/FocalNet:classification/focalnet.py at commit e8514bd,
# run with random weights; `flops()` of those classes counts each weight once per position and an
# overlapping patch embedding as if it did not overlap.
OFFICIAL = {
    "focalnet_tiny_srf": (27_658_116, 28_427_116, 4.413),
    "focalnet_tiny_lrf": (27_878_928, 28_647_928, 4.486),
    "focalnet_small_srf": (49_122_216, 49_891_216, 8.613),
    "focalnet_small_lrf": (49_573_440, 50_342_440, 8.732),
    "focalnet_base_srf": (87_123_144, 88_148_144, 15.261),
    "focalnet_base_lrf": (87_724_768, 88_749_768, 15.419),
    "focalnet_tiny_iso": (5_687_280, 5_880_280, 1.112),
    "focalnet_small_iso": (21_991_344, 22_376_344, 4.305),
    "focalnet_base_iso": (86_468_400, 87_237_400, 16.934),
    "focalnet_tiny_deeper": (24_073_380, 24_586_380, 4.109),
    "focalnet_small_deeper": (37_279_712, 37_792_712, 6.508),
    "focalnet_base_deeper": (83_125_120, 83_894_120, 14.444),
    "focalnet_large_fl3": (205_563_744, 207_100_744, 34.795),
    "focalnet_large_fl4": (205_744_248, 207_281_248, 34.846),
    "focalnet_xlarge_fl3": (364_033_120, 366_082_120, 61.498),
    "focalnet_xlarge_fl4": (364_273_784, 366_322_784, 61.567),
    "focalnet_huge_fl3": (683_747_424, 686_564_424, 115.100),
    "focalnet_huge_fl4": (686_460_664, 689_277_664, 115.810),
}

# "FLOPs" at 224 in the tables of the README of microsoft/FocalNet, GMACs with one decimal.
README_GMACS = {
    "focalnet_tiny_srf": 4.4,
    "focalnet_tiny_lrf": 4.5,
    "focalnet_small_srf": 8.6,
    "focalnet_small_lrf": 8.7,
    "focalnet_base_srf": 15.3,
    "focalnet_base_lrf": 15.4,
    "focalnet_tiny_iso": 1.1,
    "focalnet_small_iso": 4.3,
    "focalnet_base_iso": 16.9,
}

# Published by timm (results tables, GMACs with the classifier) with the input size there. Unlike
# the official counter it charges overlapping patch embeddings in full.
TIMM_GMACS = {
    "focalnet_tiny_srf": (224, 4.42),
    "focalnet_tiny_lrf": (224, 4.49),
    "focalnet_small_srf": (224, 8.62),
    "focalnet_small_lrf": (224, 8.74),
    "focalnet_base_srf": (224, 15.28),
    "focalnet_base_lrf": (224, 15.43),
    "focalnet_large_fl3": (384, 105.06),
    "focalnet_large_fl4": (384, 105.20),
    "focalnet_xlarge_fl3": (384, 185.61),
    "focalnet_xlarge_fl4": (384, 185.79),
    "focalnet_huge_fl3": (224, 118.26),
    "focalnet_huge_fl4": (224, 118.90),
}

# Backbone with its four output norms as in the official detection configs, first window 9 in every
# stage: parameters, and GMACs at 800x1280 of the official code, run with random weights.
DETECTION = {
    "focalnet_tiny_srf": (28_401_348, 94.75),
    "focalnet_tiny_lrf": (29_152_080, 99.71),
    "focalnet_small_srf": (50_639_592, 183.46),
    "focalnet_small_lrf": (52_173_696, 191.56),
    "focalnet_base_srf": (89_146_312, 321.69),
    "focalnet_base_lrf": (91_191_776, 332.48),
    "focalnet_tiny_deeper": (25_862_180, 94.04),
    "focalnet_small_deeper": (40_156_000, 148.33),
    "focalnet_base_deeper": (87_439_552, 318.05),
}


def on_meta(name: str, **overrides: object) -> FocalNet:
    with torch.device("meta"):
        return create_backbone(name, **overrides)


@functools.cache
def gmacs_without_norms(name: str, size: int) -> float:
    return analyze_backbone(on_meta(name, output_norm=False), (size, size)).macs / 1e9


def parameters(net: FocalNet) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def overlap_excess(name: str) -> float:
    """GMACs at 224 that overlapping patch embeddings need beyond the official counter's charge."""
    row = FOCALNETS[name]
    if not row.conv_embed:
        return 0.0
    macs = 56 * 56 * (7 * 7 - 4 * 4) * 3 * row.embed_dim
    for i, side in enumerate((28, 14, 7)):
        channels = row.embed_dim * 2**i
        macs += side * side * (3 * 3 - 2 * 2) * channels * 2 * channels
    return macs / 1e9


def test_every_published_variant_has_its_numbers_here() -> None:
    assert set(OFFICIAL) == set(FOCALNETS) - {"focalnet_nano"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameters(name: str) -> None:
    headless, classifier, _ = OFFICIAL[name]
    net = on_meta(name, output_norm=False)
    channels = net.output_shape()[net.stage_names[-1]].channels
    final_norm = 2 * channels
    assert parameters(net) + final_norm == headless
    assert parameters(net) + final_norm + 1000 * channels + 1000 == classifier


@pytest.mark.parametrize("name", OFFICIAL)
def test_macs_at_224(name: str) -> None:
    macs = gmacs_without_norms(name, 224)
    assert macs - overlap_excess(name) == pytest.approx(OFFICIAL[name][2], rel=0.01)
    if name in README_GMACS:
        # One per cent, and half a unit of the last digit printed there.
        assert abs(macs - README_GMACS[name]) <= 0.01 * README_GMACS[name] + 0.05


@pytest.mark.parametrize("name", TIMM_GMACS)
def test_macs_equal_timm(name: str) -> None:
    size, published = TIMM_GMACS[name]
    assert gmacs_without_norms(name, size) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", DETECTION)
def test_detection_form(name: str) -> None:
    count, gmacs = DETECTION[name]
    net = on_meta(name, focal_windows=(9, 9, 9, 9))
    assert parameters(net) == count
    assert analyze_backbone(net, (800, 1280)).macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_the_demo_variant_is_small() -> None:
    assert 1e6 < parameters(on_meta("focalnet_nano")) < 2e6
