"""Triton kernels against the reference: in Triton's interpreter, or on a GPU where there is one."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from random_blocks import block as random_block
from random_blocks import relative_error
from torch import Tensor

from focalnet_det.backbones import FOCALNETS
from focalnet_det.backbones.focalnet import FocalNetBlock
from focalnet_det.ops import dispatch
from focalnet_det.ops.kernels.parameters import Affine, flatten_modulation

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU, `make gpu-test` runs them too.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# Largest difference over the largest value; the reference computes in double precision.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton.runtime import interpreter

    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    # Half of the interpreter's time goes into checks for overflow of offsets, small ones here.
    quick = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)
    dispatch._log.cache_clear()
    yield
    dispatch._log.cache_clear()


def block(dim: int, levels: int, window: int, **flags: object) -> FocalNetBlock:
    return random_block(levels, window, dim, **{"mlp_ratio": 2.0} | flags).to(DEVICE)


def results(
    module: FocalNetBlock, x: Tensor, valid: Tensor | None, inference: bool
) -> dict[str, Tensor]:
    """Output with and, if that is asked for, without autograd, and all gradients."""
    found = {}
    if inference:
        with torch.no_grad():
            found["inference"] = module(x, valid)
    x = x.detach().requires_grad_()
    module.zero_grad()
    found["output"] = module(x, valid)
    found["output"].float().pow(2).sum().backward()
    found["x"] = x.grad
    return found | {key: p.grad.clone() for key, p in module.named_parameters()}


def assert_equal_to_reference(
    module: FocalNetBlock,
    x: Tensor,
    valid: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    inference: bool = True,
) -> None:
    module, x = module.to(dtype), x.to(DEVICE, dtype)
    path = dispatch.choose_backend(x, windows=module.modulation.focal_windows)
    assert path == "triton"
    actual = results(module, x, valid, inference)
    # In double precision the reference runs whatever is forced.
    mask = None if valid is None else valid.double()
    expected = results(module.double(), x.double(), mask, inference)
    for key, value in expected.items():
        assert actual[key].dtype == dtype
        assert relative_error(actual[key], value) <= TOLERANCE[dtype], key


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


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    out = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
    return out.permute(0, 2, 3, 1)


# Maps smaller than the window; more pixels and channels than a tile has, none a multiple of it.
SHAPES = [
    (1, (1, 1, 1, 3)),
    (3, (2, 5, 17, 33)),
    (5, (1, 17, 20, 8)),
    (7, (2, 9, 30, 5)),
    (15, (1, 1, 2, 8)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_a_level(size: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from focalnet_det.ops.kernels import triton_depthwise as depthwise
    from focalnet_det.ops.kernels.triton_prepared import taps

    monkeypatch.setattr(depthwise, "PROGRAMS", 5)
    n, h, w, c = shape
    wide = torch.randn(n, h, w, c + 8, device=DEVICE)
    x, gates = wide[..., :c], wide[..., c:]
    before, pre, outer = (torch.randn(shape, device=DEVICE) for _ in range(3))
    kernel = torch.randn(c, 1, size, size, device=DEVICE) / size
    written = torch.full_like(before, torch.nan)
    total, after, partial = depthwise.level(
        x, taps(kernel), gates, 3, 2.0, before, None, written, post=True
    )
    wanted = correlate(x.double(), kernel.double())
    context = F.gelu(wanted)
    assert relative_error(written, wanted) <= 1e-5
    assert relative_error(after, context) <= 1e-5
    assert relative_error(total, before + context * gates[..., 3:4] / 2) <= 1e-5
    mean, shared = depthwise.mean(partial, h * w)
    assert relative_error(mean, context.mean((1, 2))) <= 1e-5
    assert relative_error(shared, F.gelu(context.mean((1, 2)))) <= 1e-5

    leaf, tap = x.double().requires_grad_(), kernel.double().requires_grad_()
    grad_x, grad_kernel = torch.autograd.grad(correlate(leaf, tap), (leaf, tap), outer.double())
    target = torch.full((n, h, w, c + 8), torch.nan, device=DEVICE)
    depthwise.level_backward(outer, kernel, None, target[..., 8:])
    assert relative_error(target[..., 8:], grad_x) <= 1e-5
    assert target[..., :8].isnan().all(), "written beside the target"
    assert relative_error(depthwise.weight_gradient(x, outer, size), grad_kernel) <= 1e-5
    depthwise.level_backward(outer, kernel, None, written, (gates, 3, 2.0, before, pre))
    slope = torch.func.vmap(torch.func.grad(F.gelu))(pre.double().flatten()).view(shape)
    assert relative_error(written, (grad_x + before * gates[..., 3:4] / 2) * slope) <= 1e-5


@pytest.mark.parametrize(("depth", "columns"), [(20, 33), (96, 136)])
def test_linear_layers_with_what_follows(
    depth: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and channels that no tile divides, in two images, and fused as well as separate."""
    from focalnet_det.ops.kernels import triton_linear

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(torch.float16)

    shape = (2, 7, 11)
    layer = Affine(draw(columns, depth) / depth**0.5, draw(columns))
    x, before, gamma = draw(*shape, depth), draw(*shape, columns), draw(columns)
    wide, shared = draw(*shape, columns + 3), draw(2, columns)
    plain = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    context = wide.double()[..., columns + 1, None] / 3 * shared.double()[:, None, None]
    expected = {
        "gelu": F.gelu(plain),
        "add": before.double() + plain,
        "scaled": before.double() + gamma.double() * plain,
        "modulate": wide.double()[..., :columns] * (plain + context),
    }
    for fused in (True, False):
        pick = lambda x, key, ours, other, fused=fused: (ours if fused else other)()  # noqa: E731
        monkeypatch.setattr(triton_linear, "fastest", pick)
        actual = {
            "gelu": triton_linear.gelu_of(x, layer),
            "add": triton_linear.add(before, x, layer, None),
            "scaled": triton_linear.add(before, x, layer, gamma),
            "modulate": triton_linear.modulate(x, layer, wide, shared, columns + 1, 3.0),
        }
        for name, value in expected.items():
            assert relative_error(actual[name], value) < TOLERANCE[torch.float16], (name, fused)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 5, 9, 33), (1, 6, 7, 130)])
def test_gradients_and_their_sums(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer pixels than a tile has, and of several tiles in each of two parts."""
    from focalnet_det.ops.kernels import triton_common, triton_gradients

    monkeypatch.setattr(triton_common, "PARTS", 2)
    n, _, _, c = shape
    x, gradient, modulator = (torch.randn(shape, device=DEVICE) for _ in range(3))
    factors = torch.tensor([0.0, 2.0], device=DEVICE)[-n:].view(n, 1, 1, 1)
    for given in (None, factors):
        scaled, sums = triton_gradients.scale(gradient, given, torch.float16)
        wanted = gradient.double() * (1 if given is None else given)
        assert scaled.dtype == torch.float16
        assert relative_error(scaled, wanted) <= 1e-3
        torch.testing.assert_close(sums.double(), wanted.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)

    leaf = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.gelu(leaf), leaf, gradient.double())
    value, grad_x, sums = triton_gradients.gelu_backward(x, gradient)
    assert relative_error(value, F.gelu(x.double())) <= 1e-5
    assert relative_error(grad_x, wanted) <= 1e-5
    torch.testing.assert_close(sums.double(), wanted.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)

    wide = torch.cat([x, torch.randn(*shape[:3], 5, device=DEVICE)], dim=-1)
    sums = triton_gradients.gated_sum(gradient, wide, c + 2, 3.0)
    wanted = (gradient.double() * wide.double()[..., c + 2, None] / 3).sum((1, 2))
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-5)
    for again in (True, False):
        grad_wide = torch.full_like(wide, torch.nan)
        product, grad_modulator, sums = triton_gradients.product_backward(
            wide, modulator, gradient, grad_wide, again=again
        )
        assert (product is not None) == again
        if product is not None:
            assert torch.equal(product, x * modulator)
        assert torch.equal(grad_wide[..., :c], gradient * modulator)
        assert grad_wide[..., c:].isnan().all(), "written beside the query"
        assert torch.equal(grad_modulator, gradient * x)
        wanted = (gradient.double() * x.double()).sum((0, 1, 2))
        torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-5)


def test_gelu_of_the_kernels() -> None:
    """Against double precision, in the tails and for what is no number."""
    from focalnet_det.ops.kernels import triton_gradients

    x = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([0.0, torch.nan, torch.inf])])
    x = x.to(DEVICE)
    value, slope, _ = triton_gradients.gelu_backward(x, torch.ones_like(x))
    assert value[-2].isnan()
    assert value[-1] == torch.inf
    leaf = x[:-2].double().requires_grad_()
    wanted = F.gelu(leaf)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), leaf)
    torch.testing.assert_close(value[:-2].double(), wanted, rtol=1e-4, atol=2e-7)
    torch.testing.assert_close(slope[:-2].double(), wanted_slope, rtol=0, atol=1e-6)


def test_means_of_many_tiles() -> None:
    from focalnet_det.ops.kernels import triton_depthwise as depthwise

    partial = torch.randn(2, 70, 5, device=DEVICE)
    area = torch.tensor([7.0, 9.0], device=DEVICE)
    mean, shared = depthwise.mean(partial, area)
    assert relative_error(mean, partial.double().sum(1) / area[:, None]) <= 1e-5
    assert relative_error(shared, F.gelu(partial.double().sum(1) / area[:, None])) <= 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_shapes_for_graphs(recompute: bool) -> None:
    module = block(8, 2, 3).modulation.weights()
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
    caplog.set_level(logging.INFO, logger=dispatch.__name__)
    module, x = block(8, levels, window), torch.randn(1, 2, 3, 8, device=DEVICE)
    for _ in range(2):
        module(x)
    (message,) = [record.getMessage() for record in caplog.records]
    assert reason in message
    assert message.startswith("Focal modulation runs on the ")


@pytest.mark.skipif(DEVICE != "cpu", reason="without a GPU")
def test_without_a_gpu_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert dispatch.choose_backend(torch.randn(1, 2, 3, 8), windows=(3,)) == "torch"


@pytest.mark.parametrize(("version", "taken"), [("3.2.0", False), ("3.3.1+git1", True)])
def test_an_old_triton_is_left_alone(
    version: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    dispatch._triton_environment.cache_clear()
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    assert (dispatch.choose_backend(x, windows=(3,)) == "triton") == taken
    dispatch._triton_environment.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 33), (5000, 3), (2, 40, 130)])
def test_layer_norm_in_another_type_and_its_gradients(
    shape: tuple[int, ...], added: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row, and of more rows than one tile of each part has."""
    from focalnet_det.ops.kernels import triton_common, triton_norm

    monkeypatch.setattr(triton_common, "PARTS", 2)
    x = 3 + 2 * torch.randn(shape, device=DEVICE)
    weight, bias = torch.randn(2, shape[-1], device=DEVICE).to(dtype)
    gradient = torch.randn(shape, device=DEVICE).to(dtype)
    residual = torch.randn(shape, device=DEVICE) if added else None
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.layer_norm(leaves[0], shape[-1:], *leaves[1:], eps=1e-5)
    expected.backward(gradient.double())

    layer = Affine(weight, bias, 1e-5)
    actual, statistics = triton_norm.norm(x, layer, dtype)
    gradients = triton_norm.norm_backward(gradient, x, layer, statistics, residual)
    assert actual.dtype == dtype
    assert relative_error(actual, expected.detach()) <= TOLERANCE[dtype]
    for value, leaf in zip(gradients, leaves, strict=True):
        wanted = leaf.grad
        if leaf is leaves[0] and residual is not None:
            wanted = wanted + residual
        assert value.dtype == torch.float32
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-5 * scale)
    again = triton_norm.norm_backward(gradient, x, layer, statistics, residual)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("flags", [{}, {"layer_scale": 0.5}, {"post_norm": True}], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_sums_keep_the_type_of_the_map_in_inference(
    flags: dict, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small branches added to a large map, with autocast: 16 bits would swallow them."""
    from focalnet_det.ops.kernels import triton_block, triton_linear

    def pick(
        _: Tensor, __: object, ours: Callable[[], Tensor], other: Callable[[], Tensor]
    ) -> Tensor:
        return (ours if fused else other)()

    monkeypatch.setattr(triton_block, "fastest", pick)
    monkeypatch.setattr(triton_linear, "fastest", pick)
    module = block(20, 2, 3, **flags)
    with torch.no_grad():
        for layer in (module.norm1, module.norm2, module.mlp.fc2, module.modulation.proj):
            layer.weight.mul_(2e-3)
            layer.bias.mul_(2e-3)
    x = 1 + torch.rand(2, 3, 5, 20, device=DEVICE)
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    with torch.no_grad(), torch.autocast(DEVICE, kind):
        actual = module(x)
    assert actual.dtype == torch.float32
    with torch.no_grad(), dispatch.force_backend("reference"):
        expected = module(x)
    # The branches themselves are in 16 bits.
    assert relative_error(actual - x, expected - x) < 2e-2


def test_inference_follows_parameters_whose_version_stays() -> None:
    """Fused optimizers, writes to `data` and inference tensors leave no trace."""
    module = block(8, 1, 3)
    x = torch.randn(1, 2, 3, 8, device=DEVICE)

    def assert_current(module: FocalNetBlock) -> None:
        with torch.no_grad():
            actual = module(x)
            with dispatch.force_backend("reference"):
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

    from focalnet_det.ops.kernels import triton_launch

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
            dispatch.force_backend(path),
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
