"""Counted costs of a tiny network against hand-worked numbers."""

import json
import subprocess

import pytest
import torch
from torch import nn

from focalnet_det import create_backbone
from focalnet_det.analysis import analyze_backbone, component_parameters
from focalnet_det.backbones import FocalNet
from tests.helpers.paths import ROOT, TOOLS
from tests.helpers.processes import run_program


def tiny(**overrides: object) -> FocalNet:
    arguments = {"embed_dim": 4, "depths": (1, 2), "focal_levels": (1, 2), "focal_windows": (3, 5)}
    return FocalNet(**arguments | overrides)


# At 15x20: 4x5 positions in stage 1, 2x3 in stage 2.
#   patch_embed: 4*4*3 weights per channel, 4 channels, bias, norm
#   stage1, C=4, L=1: f 4->10, h 4->4, one 3x3 kernel, proj 4->4, fc1 4->16, fc2 16->4, two norms
#   downsample1: 2*2*4 -> 8
#   stage2, C=8, L=2: f 8->19, h, 5x5 and 7x7 kernels, proj, fc1 8->32, fc2 32->8, two norms; twice
PARAMETERS = {
    "patch_embed": 48 * 4 + 4 + 8,
    "stage1": (40 + 10) + (16 + 4) + 36 + (16 + 4) + (64 + 16) + (64 + 4) + 16,
    "norm1": 8,
    "downsample1": 16 * 8 + 8 + 16,
    "stage2": 2 * ((152 + 19) + (64 + 8) + 8 * 74 + (64 + 8) + (256 + 32) + (256 + 8) + 32),
    "norm2": 16,
}
MACS = {
    "patch_embed": 20 * 48 * 4,
    "stage1": 20 * (40 + 16 + 36 + 16 + 64 + 64),
    "norm1": 0,
    "downsample1": 6 * 16 * 8,
    "stage2": 2 * 6 * (152 + 64 + 8 * 74 + 64 + 256 + 256),
    "norm2": 0,
}
SHAPES = {
    "patch_embed": (1, 4, 5, 4),
    "stage1": (1, 4, 5, 4),
    "norm1": (1, 4, 5, 4),
    "downsample1": (1, 2, 3, 8),
    "stage2": (1, 2, 3, 8),
    "norm2": (1, 2, 3, 8),
}


@pytest.mark.parametrize("valid_context", [False, True])
def test_counts_equal_hand_worked_ones(valid_context: bool) -> None:
    cost = analyze_backbone(tiny(valid_context=valid_context), (15, 20))
    assert {part.name: part.parameters for part in cost.parts} == PARAMETERS
    assert {part.name: part.macs for part in cost.parts} == MACS
    assert {part.name: part.output_shape for part in cost.parts} == SHAPES
    assert cost.parameters == sum(PARAMETERS.values())
    assert cost.macs == sum(MACS.values())


def test_costs_grow_with_the_batch() -> None:
    one, three = (analyze_backbone(tiny(), (16, 16), batch_size=n) for n in (1, 3))
    assert three.macs == 3 * one.macs
    assert three.activation_bytes == 3 * one.activation_bytes
    assert three.parameters == one.parameters


def test_activation_memory_of_the_stem_and_a_norm() -> None:
    """A convolution keeps its input; a norm keeps its input and a mean and scale per position."""
    parts = {part.name: part for part in analyze_backbone(tiny(), (15, 20)).parts}
    padded_image, embedded, statistics = 3 * 16 * 20, 20 * 4, 2 * 20
    assert parts["patch_embed"].activation_bytes == 4 * (padded_image + embedded + statistics)
    # The norm's input is also what the first downsampling keeps: counted once.
    assert parts["norm1"].activation_bytes == 4 * (embedded + statistics)


def test_activation_memory_follows_checkpointing_freezing_and_type() -> None:
    net = tiny()
    size = (64, 64)
    full = {part.name: part.activation_bytes for part in analyze_backbone(net, size).parts}
    saving = analyze_backbone(tiny(activation_checkpointing=True), size)
    saved = {part.name: part.activation_bytes for part in saving.parts}
    # A checkpointed block keeps its input alone.
    assert saved["stage1"] == 4 * 16 * 16 * 4
    assert saved["stage2"] == 2 * 4 * 8 * 8 * 8
    # Both inputs, query, context, one level, and the hidden layer, four times as wide.
    assert full["stage1"] == 9 * saved["stage1"]
    assert saving.macs == analyze_backbone(net, size).macs
    frozen = analyze_backbone(tiny(frozen_stages=2), size)
    assert {part.name for part in frozen.parts if part.activation_bytes} == {"norm1", "norm2"}
    double = analyze_backbone(tiny().double(), size)
    single = analyze_backbone(net, size)
    assert double.reference_activation_bytes == 2 * single.reference_activation_bytes
    # The fused paths do not compute double precision.
    assert double.activation_bytes == double.reference_activation_bytes


def test_activation_memory_of_the_fused_path() -> None:
    """A block keeps both branches' inputs, 5 more maps with two levels, and the hidden layer."""
    net = tiny(focal_levels=(2, 2), depths=(1, 1))
    stage = analyze_backbone(net, (64, 64)).parts[1]
    assert stage.activation_bytes == 4 * (16 * 16 * 4) * (2 + 4 + 4)
    recompute = tiny(focal_levels=(2, 2), depths=(1, 1), lean_training=True)
    assert analyze_backbone(recompute, (64, 64)).parts[1].activation_bytes == 4 * (16 * 16 * 4) * 2


def test_analysis_leaves_the_network_alone() -> None:
    net = tiny(drop_path_rate=0.5).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    analyze_backbone(net, (40, 40))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(not module._forward_hooks for module in net.modules())
    assert {feature.device.type for feature in net(torch.zeros(1, 3, 40, 40)).values()} == {"cpu"}


def test_isotropic_and_partial_networks() -> None:
    with torch.device("meta"):
        iso = create_backbone("focalnet_tiny_iso")
        part = create_backbone("focalnet_nano", out_features=("stage2",))
    assert [p.name for p in analyze_backbone(iso).parts] == ["patch_embed", "stage3", "norm3"]
    names = [p.name for p in analyze_backbone(part).parts]
    assert names == ["patch_embed", "stage1", "downsample1", "stage2", "norm2"]


@pytest.mark.parametrize(("size", "batch_size"), [((0, 5), 1), ((5, -1), 1), ((5, 5), 0)])
def test_sizes_must_be_positive(size: tuple[int, int], batch_size: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        analyze_backbone(tiny(), size, batch_size=batch_size)


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(2, 3))
    model[2].weight = model[0].weight
    assert component_parameters(model) == {"0": 9, "2": 3}


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program(TOOLS / "analyze_model.py", *arguments, COLUMNS="120")


def test_tool_prints_json() -> None:
    result = tool("focalnet_nano", "--size", "64", "96", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    with torch.device("meta"):
        net = create_backbone("focalnet_nano")
    assert report["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert report["size"] == [64, 96]
    assert report["macs"] == sum(part["macs"] for part in report["parts"])
    assert "torch.utils.flop_counter" in report["counter"]


def test_tool_prints_a_table() -> None:
    result = tool("focalnet_tiny_srf")
    assert result.returncode == 0, result.stderr
    # The published count without a head and final norm, plus four output norms; README: 4.4 G.
    assert f"{27_658_116 - 2 * 768 + 2 * (96 + 192 + 384 + 768):,}" in result.stdout
    assert " 4.403 " in result.stdout
    assert "downsample3" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("focalnet_tinny",), "Unknown variant 'focalnet_tinny'"),
        (("focalnet_nano", "--size", "0", "5"), "must be positive"),
    ],
)
def test_tool_reports_bad_input_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = tool(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [(), ("focalnet_nano", "--config-file", "x.py")])
def test_tool_wants_a_variant_or_a_config(arguments: tuple[str, ...]) -> None:
    result = tool(*arguments)
    assert result.returncode == 2
    assert "--config-file" in result.stderr


@pytest.mark.slow
def test_tool_reads_configs() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    config = "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py"
    result = tool("--config-file", str(ROOT / config), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    # First windows of 9 and four output norms; the whole detector is published with 48.6 M.
    assert report["parameters"] == 28_401_348
    assert sum(report["components"].values()) / 1e6 == pytest.approx(48.6, abs=2)
    missing = tool("--config-file", "no_such_config.py")
    assert missing.returncode == 1
    assert "no_such_config.py" in missing.stderr
