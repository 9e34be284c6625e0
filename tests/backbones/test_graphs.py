"""Recorded graphs of a backbone work at other sizes than the one they were recorded with.

Symbolic sizes make dynamic graphs slow to build, so most networks here end after the first stage;
the padding and the flags are the same in every stage.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from focalnet_det.backbones import FOCAL_TRANSFORMERS, VARIANTS, StagedBackbone
from tests.helpers.compare import relative_error
from tests.helpers.shrunk import NAMES, shrunk

RECORDED = (64, 96)
# The maps of the last are whole windows of a Focal Transformer.
OTHERS = ((97, 131), (70, 45), (33, 33), (112, 56))


def distinct_networks() -> list[str]:
    """One row for each set of flags: rows that differ in width and depth shrink to one network."""
    seen = {}
    for name in NAMES:
        row = VARIANTS[name]
        sizes: dict[str, object] = {"embed_dim": 8, "depths": (1,) * len(row.depths)}
        if name in FOCAL_TRANSFORMERS:
            sizes["num_heads"] = (1, 2, 4, 8)
        shrunk_row = dataclasses.replace(row, **sizes, drop_path_rate=0.0, source="")
        seen.setdefault(shrunk_row, name)
    return list(seen.values())


every_network = pytest.mark.parametrize("name", distinct_networks())


def assert_equal_at_other_sizes(graph: nn.Module, net: StagedBackbone, channels: int = 3) -> None:
    for size in OTHERS:
        x = torch.randn(2, channels, *size)
        actual, expected = graph(x), net(x)
        assert actual.keys() == expected.keys()
        for key in expected:
            assert relative_error(actual[key], expected[key]) <= 1e-5, (size, key)


def example() -> Tensor:
    return torch.randn(2, 3, *RECORDED)


def one_stage(name: str) -> StagedBackbone:
    if name.endswith("_iso"):
        return shrunk(name, depths=(1,))
    return shrunk(name, depths=(1, 1, 1, 1), out_features=("stage1",))


def assert_compiles_once(net: StagedBackbone) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=True, fullgraph=True)
    compiled(example())
    assert_equal_at_other_sizes(compiled, net)
    assert counter.frame_count == 1, "recompiled for another size"


@every_network
@torch.no_grad()
def test_trace(name: str) -> None:
    net = shrunk(name)
    # A dict is no tuple, hence strict=False; the features are the same.
    assert_equal_at_other_sizes(torch.jit.trace(net, example(), strict=False), net)


@every_network
@torch.no_grad()
def test_compile(name: str) -> None:
    assert_compiles_once(one_stage(name))


@torch.no_grad()
def test_compile_with_downsampling() -> None:
    net = shrunk("focalnet_huge_fl4", depths=(1, 1, 1, 1), out_features=("stage1", "stage2"))
    assert_compiles_once(net)


@every_network
@torch.no_grad()
def test_export(name: str) -> None:
    net = one_stage(name)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net, (example(),), dynamic_shapes=({2: auto, 3: auto},))
    assert_equal_at_other_sizes(program.module(), net)


@torch.no_grad()
def test_export_of_four_stages() -> None:
    net = shrunk("focalnet_huge_fl4", depths=(1, 1, 1, 1))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net, (example(),), dynamic_shapes=({2: auto, 3: auto},))
    assert_equal_at_other_sizes(program.module(), net)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["focal_tiny", "focal_fast_tiny"])
@torch.no_grad()
def test_export_of_four_stages_with_windows(name: str) -> None:
    """PyTorch sets counts of one apart: a program is for maps of one window across, or of more."""
    net = shrunk(name, depths=(1, 1, 1, 1))
    auto = torch.export.Dim.AUTO
    x = torch.randn(2, 3, 256, 288)
    program = torch.export.export(net, (x,), dynamic_shapes=({2: auto, 3: auto},)).module()
    for size in ((230, 250), (321, 259)):
        x = torch.randn(2, 3, *size)
        for key, expected in net(x).items():
            assert relative_error(program(x)[key], expected) <= 1e-5, (size, key)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.randn(2, 3, 64, 96))


@pytest.mark.parametrize("name", ["focalnet_large_fl4", "focal_tiny", "focal_fast_tiny"])
def test_compiled_gradients(name: str) -> None:
    torch._dynamo.reset()
    net = one_stage(name)
    compiled = torch.compile(net, backend="aot_eager", dynamic=False, fullgraph=True)
    x = torch.randn(2, 3, *OTHERS[0])
    gradients = []
    for module in (net, compiled):
        net.zero_grad()
        sum((feature**3).sum() for feature in module(x).values()).backward()
        gradients.append({key: p.grad for key, p in net.named_parameters()})
    for key, expected in gradients[0].items():
        assert relative_error(gradients[1][key], expected) <= 5e-5, key
