"""Fused blocks against the readable reference, in values and in every gradient."""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalnet_det import create_backbone
from focalnet_det.backbones import FOCALNETS, FocalNet, fast_block
from focalnet_det.backbones.focalnet import FocalNetBlock
from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.focal_block import autograd, policy
from focalnet_det.ops.focal_block.pytorch import depthwise as kernels
from focalnet_det.ops.focal_block.pytorch import tiles
from tests.helpers.compare import relative_error
from tests.helpers.processes import in_two_processes
from tests.helpers.random_blocks import block

# Largest difference over the largest value. In 16 bits both sides round; the reference is fp32.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _fresh_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    # The kernels in C++ have tests of their own.
    monkeypatch.setattr(native, "library", lambda: native.BuildError("there is no compiler"))
    policy._log.cache_clear()
    yield
    policy._log.cache_clear()


def run(
    module: FocalNetBlock, x: Tensor, valid: Tensor | None = None, path: str = "torch"
) -> dict[str, Tensor]:
    """Output without and with autograd, and all gradients, on one path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(policy.VARIABLE, path)
        x = x.detach().requires_grad_()
        module.zero_grad()
        with torch.no_grad():
            results = {"inference": module(x, valid)}
        results["output"] = module(x, valid)
        results["output"].float().pow(3).sum().backward()
    results["x"] = x.grad
    return results | {key: p.grad.clone() for key, p in module.named_parameters()}


def assert_equal_to_reference(
    module: FocalNetBlock, x: Tensor, valid: Tensor | None = None, tolerance: float = 2e-5
) -> None:
    expected = run(module, x, valid, "reference")
    for key, actual in run(module, x, valid).items():
        assert relative_error(actual, expected[key]) <= tolerance, key


FLAGS = {
    "plain": {},
    "normalize": {"normalize_modulator": True},
    "norm in modulation": {"post_norm_in_modulation": True},
    "post-norm": {"post_norm": True, "layer_scale": 0.1},
    "all": {
        "post_norm": True,
        "post_norm_in_modulation": True,
        "layer_scale": 0.1,
        "normalize_modulator": True,
    },
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@pytest.mark.parametrize(
    ("levels", "window"), [(0, 3), (1, 1), (2, 3), (3, 9), (4, 3), (4, 9), (1, 15)]
)
def test_blocks(levels: int, window: int, flags: dict, recompute: bool) -> None:
    module = block(levels, window, lean_training=recompute, **flags)
    assert_equal_to_reference(module, torch.randn(2, 7, 10, 8))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 50), (3, 13, 5), (1, 47, 53), (5, 30, 29)])
@pytest.mark.parametrize("tile", [16, 100, 2048])
def test_any_size_and_tile(
    shape: tuple[int, int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    assert_equal_to_reference(block(2, 5), torch.randn(*shape, 8))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_valid_masks(flags: dict) -> None:
    valid = torch.zeros(3, 1, 9, 11)
    for mask, (h, w) in zip(valid, [(9, 11), (4, 11), (5, 3)], strict=True):
        mask[:, :h, :w] = 1
    assert_equal_to_reference(block(3, 3, **flags), torch.randn(3, 9, 11, 8), valid)


def test_inputs_and_gradients_that_are_not_contiguous() -> None:
    module = block(2, 3)
    wide = torch.randn(2, 8, 9, 14)
    x = wide.permute(0, 2, 3, 1)[:, :, ::2]
    assert not x.is_contiguous()
    assert_equal_to_reference(module, x)
    weight = torch.randn(2, 8, 7, 9).transpose(2, 3)
    gradients = []
    for path in ("reference", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(policy.VARIABLE, path)
            leaf = x.detach().requires_grad_()
            (module(leaf).permute(0, 3, 1, 2) * weight).sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) <= 2e-5


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_gates_of_any_sign(shift: float) -> None:
    module = block(3, 3)
    with torch.no_grad():
        module.modulation.f.bias[-4:] = shift
    assert_equal_to_reference(module, torch.randn(1, 8, 9, 8))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, autocast: bool, every_cpu: str) -> None:
    module, x = block(2, 3, post_norm_in_modulation=True), torch.randn(2, 9, 7, 8)
    module, x = module.to(dtype).float(), x.to(dtype).float()
    expected = run(module, x, path="reference")
    if autocast:
        context = torch.autocast("cpu", dtype)
    else:
        module, x, context = module.to(dtype), x.to(dtype), nullcontext()
    with context:
        actual = run(module, x)
    if not autocast:
        assert {value.dtype for value in actual.values()} == {dtype}
    for key, value in actual.items():
        assert relative_error(value, expected[key]) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("name", sorted(FOCALNETS))
def test_every_variant(name: str) -> None:
    depths = (1, 1, 2, 1) if len(FOCALNETS[name].depths) == 4 else (2,)
    net = create_backbone(name, embed_dim=8, depths=depths, drop_path_rate=0.0)
    for key, parameter in net.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "kernel" not in key:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    x = torch.randn(2, 3, 70, 97)
    results = []
    for path in ("reference", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(policy.VARIABLE, path)
            leaf = x.clone().requires_grad_()
            net.zero_grad()
            features = net(leaf)
            sum(feature.pow(3).sum() for feature in features.values()).backward()
            gradients = {key: p.grad.clone() for key, p in net.named_parameters()}
            with torch.no_grad():
                evaluated = {f"eval {key}": value for key, value in net.eval()(x).items()}
        results.append(features | evaluated | gradients | {"x": leaf.grad})
    for key, expected in results[0].items():
        # Single precision through up to five blocks; most are off by a tenth of this.
        assert relative_error(results[1][key].detach(), expected.detach()) <= 1e-4, key


def test_repeated_runs_are_bitwise_equal() -> None:
    module, x = block(3, 9), torch.randn(2, 20, 31, 8)
    first, second = run(module, x), run(module, x)
    assert all(torch.equal(first[key], second[key]) for key in first)


# The custom functions by finite differences


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_gradcheck(flags: dict, masked: bool, recompute: bool) -> None:
    module = block(2, 3, dim=2, **flags).double()
    names = [name for name, _ in module.named_parameters()]
    valid = torch.ones(2, 3, 4, 1, dtype=torch.float64)
    valid[1, 2:] = 0
    plan = autograd.ComputePolicy("torch", torch.float64, torch.float64, recompute)

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.func.functional_call(
            _Weights(module), {f"module.{k}": v for k, v in zip(names, parameters, strict=True)}, ()
        )
        norm1, norm2 = (None, None) if module.post_norm else (weights.norm1, weights.norm2)
        mask = valid if masked else None
        y = autograd.modulation(x, norm1, weights.modulation, mask, plan)
        return y, autograd.mlp(x, norm2, weights.mlp, plan)

    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), nondet_tol=0.0)


class _Weights(nn.Module):
    def __init__(self, module: FocalNetBlock) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> object:
        return fast_block.block_weights(self.module)


def test_a_second_derivative_is_an_error() -> None:
    x = torch.randn(1, 4, 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(block()(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


# The depthwise convolution by explicit sums


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise cross-correlation of (N, H, W, C), tap by tap on a padded copy."""
    size = kernel.shape[-1]
    radius = size // 2
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, radius, radius, radius, radius))
    return sum(
        padded[:, i : i + height, j : j + width] * kernel[:, 0, i, j]
        for i in range(size)
        for j in range(size)
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 4, 30, 5), (1, 33, 6, 8), (3, 9, 9, 16)])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11, 13, 15])
def test_depthwise_equals_sums(size: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(shape[-1], 1, size, size, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(shape)
    expected = correlate(x, kernel)
    grad_x, grad_kernel = torch.autograd.grad(expected, (x, kernel), gradient.double())
    single = x.detach().float(), kernel.detach().float()
    for actual, wanted in (
        (kernels.depthwise(*single), expected),
        (kernels.depthwise_input_gradient(gradient, single[1]), grad_x),
        (kernels.depthwise_weight_gradient(single[0], gradient, size), grad_kernel),
    ):
        assert actual.dtype == torch.float32
        assert relative_error(actual, wanted.detach()) <= 1e-5


def test_depthwise_makes_no_layout_copy() -> None:
    x = torch.randn(1, 20, 24, 16)
    kernel = torch.randn(16, 1, 5, 5)
    with torch.profiler.profile() as profile:
        out = kernels.depthwise(x, kernel)
    assert out.is_contiguous()
    assert not {event.key for event in profile.key_averages()} & {"aten::copy_", "aten::clone"}


# Memory


def kept_bytes(function: Callable[[], object], parameters: list[Tensor]) -> int:
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in parameters}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return total


@pytest.mark.parametrize(("recompute", "share"), [(False, 0.5), (True, 0.2)])
@pytest.mark.parametrize("levels", [2, 3])
def test_activations_kept_for_training(
    levels: int, recompute: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = block(levels, 3, dim=32, lean_training=recompute).train()
    x = torch.randn(1, 32, 32, 32, requires_grad=True)
    kept = {}
    for path in ("reference", "torch"):
        monkeypatch.setenv(policy.VARIABLE, path)
        kept[path] = kept_bytes(lambda: module(x), list(module.parameters()))
    assert kept["torch"] <= share * kept["reference"]


# Dispatch


def path_of(
    module: FocalNetBlock, x: Tensor, monkeypatch: pytest.MonkeyPatch, forced: str | None = None
) -> str:
    if forced is not None:
        monkeypatch.setenv(policy.VARIABLE, forced)
    path = policy.choose_backend(x, exact=lambda: fast_block.is_plain(module))
    assert module(x).shape == x.shape
    return path


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), torch.randn(1, 4, 5, 8)
    assert path_of(module, x, monkeypatch) == "torch"
    assert path_of(module, x[:0], monkeypatch) == "reference"
    assert path_of(block().double(), x.double(), monkeypatch) == "reference"
    for forced, path in (("reference", "reference"), ("torch", "torch"), ("native", "torch")):
        assert path_of(module, x, monkeypatch, forced) == path
    monkeypatch.setenv(policy.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="FOCALNET_DET_OPS=cuda: must be one of native, refer"):
        module(x)


def test_hooks_and_foreign_layers_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, 5, 8)
    hooked = block()
    seen = []
    handle = hooked.modulation.h.register_forward_hook(lambda *_: seen.append(1))
    assert path_of(hooked, x, monkeypatch) == "reference"
    assert seen
    handle.remove()
    assert path_of(hooked, x, monkeypatch) == "torch"

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    foreign = block()
    foreign.mlp.fc2 = Doubled(32, 8)
    assert path_of(foreign, x, monkeypatch) == "reference"


def test_the_path_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=policy.__name__)
    module, x = block(), torch.randn(1, 4, 5, 8)
    for _ in range(3):
        module(x)
        module.double()(x.double())
        module.float()
    assert [record.getMessage() for record in caplog.records] == [
        "Focal modulation runs on the torch backend: there is no compiler.",
        "Focal modulation runs on the reference backend: only the reference backend supports "
        "torch.float64.",
    ]


def test_frozen_parts_get_no_gradient() -> None:
    module = block().train()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(("modulation.f.", "mlp.fc1.")))
    module(torch.randn(1, 4, 4, 8)).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_dropout_and_drop_path_act() -> None:
    torch.manual_seed(0)
    module = block(drop_rate=0.5, drop_path_rate=0.5).train()
    x = torch.randn(16, 4, 4, 8)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(module(x), first)
    kept_whole = (first == x).flatten(1).all(1)
    assert 0 < int(kept_whole.sum()) < 16, "a dropped branch leaves the residual"


def train_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = FocalNet(embed_dim=8, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3))
    data = torch.randn(2, 3, 32, 40)
    parallel = nn.parallel.DistributedDataParallel(net)
    sum(value.pow(2).mean() for value in parallel(data[rank : rank + 1]).values()).backward()
    together = {key: p.grad.clone() for key, p in net.named_parameters()}
    net.zero_grad()
    # The mean over images is the mean over processes.
    sum(value.pow(2).mean() for value in net(data).values()).backward()
    for key, parameter in net.named_parameters():
        assert relative_error(together[key], parameter.grad) <= 1e-4, key
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    in_two_processes(
        "tests.ops.focal_block.pytorch.test_depthwise", "train_rank", tmp_path / "store"
    )
