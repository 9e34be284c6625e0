"""Triton kernels against the reference: in Triton's interpreter, or on a GPU where there is one."""

import importlib.util
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from focalnet_det.backbones import FOCALNETS, fast_block
from focalnet_det.backbones.focalnet import FocalNetBlock
from focalnet_det.ops.focal_block import policy
from focalnet_det.ops.focal_block.weights import flatten_modulation
from tests.helpers.compare import relative_error

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from tests.helpers.triton_blocks import DEVICE, TOLERANCE, assert_equal_to_reference, block

pytestmark = [pytest.mark.usefixtures("triton_path")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)  # `make gpu-test` runs them too


def distinct_blocks() -> list[tuple]:
    """Levels, window and flags of the blocks of all variants."""
    return sorted(
        {
            (
                levels, window, row.post_norm, row.post_norm_in_modulation,
                row.layer_scale is not None, row.normalize_modulator,
            )
            for row in FOCALNETS.values()
            for levels, window in zip(row.focal_levels, row.focal_windows, strict=True)
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", distinct_blocks(), ids=lambda row: "-".join(str(v) for v in row))
def test_blocks_of_every_variant(row: tuple) -> None:
    levels, window, post_norm, norm_in_modulation, scaled, normalize = row
    flags = {
        "post_norm": post_norm,
        "post_norm_in_modulation": norm_in_modulation,
        "layer_scale": 0.5 if scaled else None,
        "normalize_modulator": normalize,
    }
    # Both ways to train, and a batch with padding, somewhere among the rows.
    masked = levels == 3
    module = block(12, levels, window, lean_training=masked and norm_in_modulation, **flags)
    valid = torch.ones(1, 1, 2, 4, device=DEVICE)
    valid[..., 1:, 2:] = 0
    x = torch.randn(1, 2, 4, 12, device=DEVICE)
    if masked:
        x = x * valid.permute(0, 2, 3, 1)
    # Inference runs the same kernels of the levels, which take long in the interpreter.
    assert_equal_to_reference(
        module, x, valid if masked else None, inference=not norm_in_modulation and levels < 4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, every_cpu: str) -> None:
    """In the interpreter, on CPUs, the type to compute in may be wider than that of the map."""
    assert_equal_to_reference(block(20, 1, 3), torch.randn(2, 3, 5, 20), dtype=dtype)


@pytest.mark.parametrize("recompute", [False, True])
def test_shapes_for_graphs(recompute: bool) -> None:
    module = fast_block.modulation_weights(block(8, 2, 3).modulation)
    parameters, layout = flatten_modulation(None, module)
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    arguments = (x, None, parameters, *layout, "triton", torch.float32, torch.float32, recompute)
    torch.library.opcheck(
        torch.ops.focalnet_det.modulation.default, arguments, test_utils="test_faketensor"
    )


@pytest.mark.parametrize(
    ("levels", "window", "reason"),
    [
        (0, 3, "need at least 1 focal level"),
        (1, 17, "windows of at most 15"),
        (2, 15, "at most 15"),
    ],
)
def test_what_the_kernels_cannot_do_is_logged_once(
    levels: int, window: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=policy.__name__)
    module, x = block(8, levels, window), torch.randn(1, 2, 3, 8, device=DEVICE)
    for _ in range(2):
        module(x)
    (message,) = [record.getMessage() for record in caplog.records]
    assert reason in message
    assert message.startswith("Focal modulation runs on the ")


@pytest.mark.skipif(DEVICE != "cpu", reason="without a GPU")
def test_without_a_gpu_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert policy.choose_backend(torch.randn(1, 2, 3, 8), windows=(3,)) == "torch"


@pytest.mark.parametrize(("version", "taken"), [("3.2.0", False), ("3.3.1+git1", True)])
def test_an_old_triton_is_left_alone(
    version: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    policy._triton_environment.cache_clear()
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    assert (policy.choose_backend(x, windows=(3,)) == "triton") == taken
    policy._triton_environment.cache_clear()


def test_inference_follows_parameters_whose_version_stays() -> None:
    """Fused optimizers, writes to `data` and inference tensors leave no trace."""
    module = block(8, 1, 3)
    x = torch.randn(1, 2, 3, 8, device=DEVICE)

    def assert_current(module: FocalNetBlock) -> None:
        with torch.no_grad():
            actual = module(x)
            with policy.force_backend("reference"):
                expected = module(x)
        assert relative_error(actual, expected) <= TOLERANCE[torch.float32]

    assert_current(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    module(x).square().sum().backward()
    optimizer.step()
    assert_current(module)
    module.modulation.f.weight.data.mul_(2)
    module.modulation.focal_layers[0][0].weight.data.mul_(2)
    assert_current(module)
    with torch.inference_mode():
        module = block(8, 1, 3)
        module.mlp.fc1.bias = None
        first = module(x)
        module.mlp.fc2.bias.add_(1)
        assert relative_error(module(x), first + 1) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_compiled_training(autocast: bool) -> None:
    """Results of a registered operator must not share memory with each other."""
    module = block(8, 1, 3).train()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    found = []
    for run in (module, compiled):
        given = x.clone().requires_grad_()
        module.zero_grad()
        with torch.autocast(DEVICE, kind, enabled=autocast):
            out = run(given)
        out.square().sum().backward()
        found.append([out.detach(), given.grad, *(p.grad.clone() for p in module.parameters())])
    for ours, wanted in zip(*found, strict=True):
        assert relative_error(ours, wanted) <= (2e-2 if autocast else 1e-5)


class Compiled:
    """Stands for a compiled kernel and for what Triton launches and tunes it with."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.best_config = SimpleNamespace(kwargs=sizes)
        self.first: list[tuple] = []
        self.again: list[tuple] = []

    def __getitem__(self, grid: object) -> Callable[..., "Compiled"]:
        def launch(*arguments: object, **constants: object) -> "Compiled":
            (self.first if constants else self.again).append((grid, arguments, constants))
            return self

        return launch


def test_a_second_launch_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all arguments in the order of the kernel's parameters, and only for the same code."""
    import triton.language as tl

    from focalnet_det.ops.focal_block.triton import triton_launch

    def function(x, y, count, C: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
        pass

    function.__annotations__ = dict.fromkeys(("C", "ROWS", "WIDE"), tl.constexpr)
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch.Kernel, "reuse", True)
    kernel = triton_launch.Kernel(function, key=["C"], choices=())
    compiled = Compiled({"ROWS": 16})
    monkeypatch.setattr(kernel, "_jit", lambda numbers: compiled if numbers == ["count"] else None)
    storage = torch.zeros(64)
    x, y = storage[:8], storage[8:16]

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return 7, sizes["ROWS"]

    kernel(grid, x, y, 3, C=8, WIDE=True)
    assert compiled.first == [(grid, (x, y, 3), {"C": 8, "WIDE": True})]
    kernel(grid, x, y, 5, C=8, WIDE=True)
    assert compiled.again == [((7, 16, 1), (x, y, 5, 8, 16, True), {})]
    # Another constant, type, alignment, or a number of 64 bits.
    kernel(grid, x, y, 3, C=9, WIDE=True)
    kernel(grid, x, y.half(), 3, C=8, WIDE=True)
    kernel(grid, x, storage[9:17], 3, C=8, WIDE=True)
    kernel(grid, x, y, 2**31, C=8, WIDE=True)
    assert len(compiled.first) == 5
    assert len(compiled.again) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_residual_sums_with_stochastic_depth(autocast: bool) -> None:
    module = block(8, 1, 3, drop_path_rate=0.5).train()
    x = torch.randn(5, 2, 3, 8, device=DEVICE)
    # The interpreter multiplies the bits of bfloat16 as integers.
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float16

    def run(path: str, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(3)
        module.zero_grad()
        given = x.clone().requires_grad_()
        with (
            policy.force_backend(path),
            torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32),
        ):
            out = module(given)
        assert out.dtype == torch.float32
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in [given, *module.parameters()])]

    expected = run("reference", torch.float32)
    actual = run("triton", kind if autocast else torch.float32)
    dropped = [bool((image == before).all()) for image, before in zip(actual[0], x, strict=True)]
    assert any(dropped)
    assert not all(dropped)
    for ours, wanted in zip(actual, expected, strict=True):
        assert relative_error(ours, wanted) < (2e-2 if autocast else 1e-5)
