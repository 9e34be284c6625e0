"""Blocks on the kernels in C++ against the readable reference, in values and in every gradient."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.focal_block import policy
from focalnet_det.ops.focal_block.cpu import native_inference
from tests.helpers.compare import relative_error
from tests.helpers.native_blocks import needs_compiler, run
from tests.helpers.random_blocks import block

# Blocks

FLAGS = {
    "plain": {},
    "post-norm": {"post_norm": True, "layer_scale": 0.1},
    "all": {
        "post_norm": True,
        "post_norm_in_modulation": True,
        "layer_scale": 0.1,
        "normalize_modulator": True,
        "lean_training": True,
    },
}


@pytest.fixture(params=[True, False], ids=["one call", "tiles"])
def in_one_call(
    request: pytest.FixtureRequest, library: native.Library, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Names of the branches, in training, that were one call each."""
    calls: list[str] = []
    function = native.Library.run

    def counted(self: native.Library, name: str, call: Any) -> None:
        if name in ("modulation", "mlp"):
            calls.append(name)
        function(self, name, call)

    monkeypatch.setattr(native.Library, "run", counted)
    if not request.param:
        monkeypatch.setattr(policy, "LARGEST_MAP", 0)
    yield calls
    assert request.param or not calls


@needs_compiler
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@pytest.mark.parametrize(
    ("levels", "window", "dim", "size"),
    [
        (0, 3, 8, (5, 6)),
        (2, 3, 96, (23, 37)),
        (3, 9, 13, (4, 40)),
        (4, 9, 5, (2, 1)),
        (1, 17, 8, (9, 9)),
        (4, 3, 40, (17, 33)),
        (9, 3, 8, (5, 6)),
    ],
)
def test_blocks_equal_the_reference(
    levels: int, window: int, dim: int, size: tuple, flags: dict, masked: bool, in_one_call: list
) -> None:
    module, x = block(levels, window, dim, **flags), torch.randn(2, *size, dim)
    valid = torch.ones(2, 1, *size)
    valid[1, :, size[0] // 2 + 1 :] = 0
    expected = run(module, x, valid if masked else None, "reference")
    for key, actual in run(module, x, valid if masked else None, "native").items():
        assert relative_error(actual, expected[key]) <= 2e-5, key


@needs_compiler
def test_all_branches_of_plain_blocks_are_one_call_each(in_one_call: list) -> None:
    run(block(2, 9, 8), torch.randn(2, 5, 6, 8), None, "native")
    wanted = ["modulation", "mlp", "mlp", "modulation"]
    assert in_one_call == (wanted if policy.LARGEST_MAP else [])


@needs_compiler
def test_parameters_of_another_type_are_converted(in_one_call: list) -> None:
    module, x = block(2, 3, 8), torch.randn(2, 5, 6, 8)
    for layer in (module.mlp.fc1, module.modulation.f):
        layer.to(torch.bfloat16)
    actual = run(module, x, None, "native")
    expected = run(module.float(), x, None, "native")
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= 1e-2, key
    assert relative_error(actual["output"], expected["output"]) <= 1e-6


@needs_compiler
def test_parameters_in_any_memory_order(in_one_call: list) -> None:
    module, x = block(2, 3, 8), torch.randn(2, 5, 6, 8)
    expected = run(module, x, None, "native")
    module.to(memory_format=torch.channels_last)
    module.mlp.fc1.weight.data = module.mlp.fc1.weight.t().contiguous().t()
    for key, actual in run(module, x, None, "native").items():
        assert relative_error(actual, expected[key]) <= 1e-6, key


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@pytest.mark.parametrize(
    ("levels", "window", "dim", "size"),
    [
        (2, 3, 96, (23, 37)),
        (3, 9, 13, (4, 40)),
        (4, 9, 5, (2, 1)),
        (4, 3, 40, (17, 33)),
        (2, 3, 104, (9, 11)),
        (1, 3, 416, (5, 7)),
    ],
)
def test_blocks_in_bfloat16_are_as_exact_as_stock_layers(
    levels: int,
    window: int,
    dim: int,
    size: tuple,
    flags: dict,
    autocast: bool,
    library: native.Library,
) -> None:
    module, x = block(levels, window, dim, **flags), torch.randn(2, *size, dim)
    valid = torch.ones(2, 1, *size)
    valid[1, :, size[0] // 2 + 1 :] = 0
    module, x = module.bfloat16().float(), x.bfloat16().float()
    with torch.no_grad(), policy.force_backend("reference"):
        expected = module(x, valid)
    if not autocast:
        module, x = module.bfloat16(), x.bfloat16()
    errors = {}
    for path in ("reference", "native"):
        autocasting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with torch.no_grad(), policy.force_backend(path), autocasting:
            actual = module(x, valid)
        errors[path] = (actual.double() - expected).square().mean().sqrt()
    if library.has_tiles:  # else residuals and sums are rounded as well
        assert errors["native"] <= 1.2 * errors["reference"]
    assert errors["native"] <= 1e-2 * expected.square().mean().sqrt()


@needs_compiler
def test_a_hidden_layer_in_parts_and_inputs_that_are_not_contiguous(library: object) -> None:
    module = block(2, 3, 104)
    x = torch.randn(2, 104, 9, 14).permute(0, 2, 3, 1)[:, :, ::2]
    assert not x.is_contiguous()
    assert len(module.mlp.fc1.weight) > 384
    expected = run(module, x, None, "reference")
    for key, actual in run(module, x, None, "native").items():
        assert relative_error(actual, expected[key]) <= 2e-5, key


@needs_compiler
@pytest.mark.parametrize(
    ("dim", "size", "whole"),
    [(192, (3, 3), True), (200, (3, 3), False), (200, (32, 64), True), (392, (32, 64), False)],
)
def test_wide_blocks_of_few_pixels_are_left_to_torch(
    dim: int, size: tuple, whole: bool, library: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    function = native_inference.block_in_one_call

    def counted(library: native.Library, x: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return function(library, x, *rest)

    monkeypatch.setattr(native_inference, "block_in_one_call", counted)
    module, x = block(1, 3, dim).eval(), torch.randn(1, *size, dim)
    with torch.no_grad():
        with policy.force_backend("native"):
            actual = module(x)
        assert calls == [(1, *size, dim)] * whole
        with policy.force_backend("reference"):
            assert relative_error(actual, module(x)) <= 2e-5


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool, library: object, every_cpu: str) -> None:
    module, x = block(2, 3, 24), torch.randn(2, 9, 7, 24)
    module, x = module.bfloat16().float(), x.bfloat16().float()
    expected = run(module, x, None, "reference")
    if not autocast:
        module, x = module.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = run(module, x, None, "native")
    for key, value in actual.items():
        assert relative_error(value, expected[key]) <= 6e-2, key


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_float16(autocast: bool, library: object, every_cpu: str) -> None:
    """In C++ with float32 in between; products that a CPU does in float16 are left to PyTorch."""
    module, x = block(2, 3, 24), torch.randn(2, 9, 7, 24)
    module, x = module.half().float(), x.half().float()
    expected = run(module, x, None, "reference")
    if not autocast:
        module, x = module.half(), x.half()
    path = "torch" if every_cpu in ("fp16", "amx") else "native"
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        actual = run(module, x, None, path)
    for key, value in actual.items():
        assert autocast or value.dtype == torch.float16
        assert relative_error(value, expected[key]) <= 5e-3, key


@needs_compiler
def test_an_empty_batch_runs_on_the_reference(library: object) -> None:
    x = torch.randn(0, 4, 5, 8)
    assert policy.choose_backend(x) == "reference"
    assert block(2, 3, 8)(x).shape == x.shape


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_results_repeat_bit_by_bit(
    threads: int, library: native.Library, in_one_call: list
) -> None:
    module, x = block(3, 9, 40), torch.randn(2, 37, 70, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (run(module, x, None, "native") for _ in range(2))
        weight = library.depthwise_weight_gradient(x, x, 9)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(weight, library.depthwise_weight_gradient(x, x, 9)), "differs by threads"
