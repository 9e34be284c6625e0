"""Deformable attention against a loop, autograd's numbers, transformers and stored outputs."""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from focalnet_det.ops.deformable_attention import choose_backend, deformable_attention
from focalnet_det.ops.focal_block import policy
from tests.helpers.paths import SHARED

BACKENDS = ("reference", "pytorch", "bags")
STORED = SHARED / "refs/deformable_attention/refs.npz"
# Odd sides, a lone cell, a level without any.
SHAPES = [(5, 7), (0, 3), (1, 1), (3, 2)]


def problem(
    shapes: list[tuple[int, int]], spread: float = 1.6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations, also outside, and weights; 2 images, 4 queries, 3 heads of 6, 2 points."""
    cells = sum(height * width for height, width in shapes)
    value = torch.randn(2, cells, 3, 6, dtype=dtype)
    locations = 0.5 + spread * (torch.rand(2, 4, 3, len(shapes), 2, 2, dtype=dtype) - 0.5)
    return value, locations, torch.randn(locations.shape[:-1], dtype=dtype)


def loop(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and gradients of its sum, number by number, from the definition."""
    images, queries, heads, levels, points = weights.shape
    out = torch.zeros(images, queries, heads * value.shape[3], dtype=value.dtype)
    grads = [torch.zeros_like(x) for x in (value, locations, weights)]
    starts = np.cumsum([0, *(height * width for height, width in shapes)])
    for n, q, m, lev, p in np.ndindex(images, queries, heads, levels, points):
        height, width = shapes[lev]
        x = float(locations[n, q, m, lev, p, 0]) * width - 0.5
        y = float(locations[n, q, m, lev, p, 1]) * height - 0.5
        weight = float(weights[n, q, m, lev, p])
        left, top = math.floor(x), math.floor(y)
        for row in (top, top + 1):
            for column in (left, left + 1):
                if not (0 <= row < height and 0 <= column < width):
                    continue
                cell = value[n, starts[lev] + row * width + column, m]
                by_x, by_y = 1 - abs(x - column), 1 - abs(y - row)
                channels = slice(m * value.shape[3], (m + 1) * value.shape[3])
                out[n, q, channels] += weight * by_x * by_y * cell
                total = float(cell.sum())
                grads[0][n, starts[lev] + row * width + column, m] += weight * by_x * by_y
                sign_x, sign_y = (1 if column > left else -1), (1 if row > top else -1)
                grads[1][n, q, m, lev, p, 0] += weight * total * sign_x * by_y * width
                grads[1][n, q, m, lev, p, 1] += weight * total * sign_y * by_x * height
                grads[2][n, q, m, lev, p] += total * by_x * by_y
    return out, *grads  # type: ignore[return-value]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [1.6, 40.0])
def test_values_and_gradients_are_those_of_a_loop(backend: str, spread: float) -> None:
    tensors = problem(SHAPES, spread)
    inputs = [x.clone().requires_grad_() for x in tensors]
    out = deformable_attention(inputs[0], SHAPES, *inputs[1:], backend=backend)
    out.sum().backward()
    expected = loop(tensors[0], SHAPES, *tensors[1:])
    for actual, wanted in zip([out, *(x.grad for x in inputs)], expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_that_are_far_outside_or_infinite_read_nothing(backend: str) -> None:
    value, locations, weights = problem([(4, 5)])
    locations = locations.fill_(1e30).requires_grad_()
    out = deformable_attention(value, [(4, 5)], locations, weights, backend=backend)
    out.sum().backward()
    assert not out.any()
    assert locations.grad is not None
    assert not locations.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_read_where_all_levels_are_empty_or_no_query_asks(backend: str) -> None:
    value, locations, weights = problem([(0, 2), (3, 0)])
    out = deformable_attention(value, [(0, 2), (3, 0)], locations, weights, backend=backend)
    assert out.shape == (2, 4, 18)
    assert not out.any()
    value, locations, weights = problem([(2, 2)])
    nobody = deformable_attention(value, [(2, 2)], locations[:, :0], weights[:, :0], backend)
    assert nobody.shape == (2, 0, 18)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_numerical_ones(backend: str) -> None:
    value, locations, weights = problem([(3, 4), (2, 1)])
    # Away from whole pixels, where the derivative jumps.
    assert (locations * 12 - 0.5).frac().abs().min() > 1e-4
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda v, x, w: deformable_attention(v, [(3, 4), (2, 1)], x, w, backend), inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["m2f", "edges", "odd_head"])
def test_outputs_are_those_of_the_official_code(backend: str, case: str) -> None:
    if not STORED.is_file():
        pytest.skip("stored outputs are missing: no folder ../shared/refs/deformable_attention")
    with np.load(STORED) as file:
        stored = {
            k[len(case) + 1 :]: torch.from_numpy(file[k]) for k in file.files if k.startswith(case)
        }
    inputs = [stored[k].requires_grad_() for k in ("value", "locations", "weights")]
    shapes = [tuple(pair) for pair in stored["shapes"].tolist()]
    out = deformable_attention(inputs[0], shapes, *inputs[1:], backend=backend)
    out.backward(stored["grad_output"])
    smooth = stored["smooth"][..., None]
    bars = {"output": 5e-6, "grad_value": 5e-6, "grad_locations": 2e-4, "grad_weights": 1e-4}
    actual = dict(zip(bars, (out, *(x.grad for x in inputs)), strict=True))
    for name, bar in bars.items():
        kept = smooth if name == "grad_locations" else torch.tensor(True)
        assert ((actual[name] - stored[name]) * kept).abs().max() <= bar, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_those_of_transformers(backend: str) -> None:
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    shapes = [(9, 6), (3, 4)]
    value, locations, weights = problem(shapes, dtype=torch.float32)
    expected = module.multi_scale_deformable_attention(value, shapes, locations, weights)
    actual = deformable_attention(value, shapes, locations, weights, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_rounds_the_value_and_the_result_alone(
    backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    # Wider than half precision can number: locations in it would be off by pixels.
    shapes = [(1, 700)]
    value, locations, weights = problem(shapes, 0.9, torch.float32)
    exact = deformable_attention(
        value.to(dtype).double(), shapes, locations.double(), weights.double(), "reference"
    )
    with torch.autocast("cpu", dtype=dtype):
        actual = deformable_attention(value.to(dtype), shapes, locations, weights, backend)
    assert actual.dtype == dtype
    assert (actual - exact).abs().max() <= tolerance * exact.abs().max()


class PeakMemory(TorchDispatchMode):
    """Largest sum of bytes that tensors made in the meantime held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                number, size = storage._cdata, storage.nbytes()
                if number not in self.known:
                    self.known.add(number)
                    self.live += size
                    weakref.finalize(storage, self._gone, number, size)
        self.peak = max(self.peak, self.live)
        return result


def stacked(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The usual form: samples of all levels first, (N * heads, D, Q, L * points)."""
    samples = []
    for i, cells in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        maps = cells.flatten(2).transpose(1, 2).reshape(-1, value.shape[3], *shapes[i])
        grid = (2 * locations[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid, align_corners=False))
    by = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    out = (torch.cat(samples, dim=-1) * by).sum(-1)
    return out.view(value.shape[0], -1, out.shape[-1]).transpose(1, 2)


def test_memory_in_training_is_that_of_a_level() -> None:
    shapes = [(16, 16)] * 4
    cells = 4 * 256

    def peak(function: Any) -> int:
        inputs = [
            torch.randn(1, cells, 4, 32),
            torch.rand(1, cells, 4, 4, 4, 2),
            torch.rand(1, cells, 4, 4, 4),
        ]
        inputs = [x.requires_grad_() for x in inputs]
        with PeakMemory() as memory:
            function(*inputs).sum().backward()
        return memory.peak

    usual = peak(lambda v, x, w: stacked(v, shapes, x, w))
    ours = peak(lambda v, x, w: deformable_attention(v, shapes, x, w, "pytorch"))
    bags = peak(lambda v, x, w: deformable_attention(v, shapes, x, w, "bags"))
    assert ours < usual / 2.5
    assert bags < usual / 3


def test_memory_is_counted() -> None:
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
    assert memory.peak == 8000
    assert c.sum() == 2000


def test_backends_follow_device_order_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    value = torch.zeros(1, 1, 1, 1)
    assert choose_backend(value) == "bags"
    assert choose_backend(value.to("meta")) == "pytorch"
    monkeypatch.setenv(policy.VARIABLE, "reference")
    assert choose_backend(value) == "reference"


@pytest.mark.slow
def test_compiled_and_exported_graphs_give_the_same() -> None:
    class Sampler(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return deformable_attention(value, [(5, 7), (3, 2)], locations, weights)

    inputs = problem([(5, 7), (3, 2)], dtype=torch.float32)
    expected = Sampler()(*inputs)
    exported = torch.export.export(Sampler(), inputs)
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any("gather" in name for name in operators)
    assert not any("grid_sampler" in name or "embedding_bag" in name for name in operators)
    torch.testing.assert_close(exported.module()(*inputs), expected, rtol=1e-5, atol=5e-6)
    leaves = [x.clone().requires_grad_() for x in inputs]
    compiled = torch.compile(Sampler(), backend="aot_eager", fullgraph=True)
    out = compiled(*leaves)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=5e-6)
    out.sum().backward()
    again = [x.clone().requires_grad_() for x in inputs]
    Sampler()(*again).sum().backward()
    for a, b in zip(leaves, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_together_is_refused() -> None:
    value, locations, weights = problem([(3, 4)])
    with pytest.raises(ValueError, match=r"levels of sizes \[\(3, 5\)\] need \(N, 15, heads"):
        deformable_attention(value, [(3, 5)], locations, weights)
    with pytest.raises(ValueError, match="locations have shape"):
        deformable_attention(value, [(3, 2), (3, 2)], locations, weights)
    with pytest.raises(ValueError, match="weights have shape"):
        deformable_attention(value, [(3, 4)], locations, weights[:, :1])
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"):
        deformable_attention(value, [(3, 4)], locations, weights, "cuda")
