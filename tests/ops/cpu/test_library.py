"""Functions in C++ against PyTorch's own; how they are built: test_native_build.py."""

import pytest
import torch
import torch.nn.functional as F

from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.focal_block.weights import Affine
from tests.helpers.compare import relative_error
from tests.helpers.native_blocks import needs_compiler

# Largest difference over the largest value; in bfloat16 against float64 of the rounded inputs.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


# Functions


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 4, 30, 5), (1, 35, 6, 40), (3, 9, 70, 13), (1, 18, 33, 96)]
)
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11, 13, 15])
def test_depthwise_equals_the_stock_layer(
    size: int, shape: tuple, dtype: torch.dtype, library: native.Library
) -> None:
    x, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    kernel = torch.randn(shape[-1], 1, size, size).to(dtype)
    inputs = x.double().requires_grad_(), kernel.double().requires_grad_()
    expected = F.conv2d(
        inputs[0].permute(0, 3, 1, 2), inputs[1], padding=size // 2, groups=shape[-1]
    ).permute(0, 2, 3, 1)
    grad_x, grad_kernel = torch.autograd.grad(expected, inputs, gradient.double())
    valid = (torch.rand(*shape[:3], 1) > 0.3).float()
    before, after = library.level(x, kernel, valid)
    for actual, wanted in (
        (library.depthwise(x, kernel), expected),
        (before, expected),
        (library.depthwise(gradient, kernel, flip=True), grad_x),
        (library.depthwise_weight_gradient(x, gradient, size), grad_kernel),
    ):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted.detach()) <= TOLERANCE[dtype]
    wanted = (F.gelu(expected) * valid).detach()
    assert (after - wanted).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@needs_compiler
def test_gelu_and_its_slope(library: native.Library) -> None:
    x = torch.cat([torch.linspace(-12, 12, 99_991), torch.tensor([0.0, -0.0, 60.0, -60.0, 1e9])])
    exact = x.double().requires_grad_()
    expected = F.gelu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    actual = library.gelu(x)
    assert ((actual - expected).abs() <= 3e-7 * x.abs().clamp(min=1)).all()
    ones, out = torch.ones_like(x), torch.empty_like(x)
    actual = library.level_backward(ones, None, None, x, None, out=out)
    assert relative_error(actual, slope.detach()) <= 2e-6
    special = torch.tensor([float("nan"), float("inf")])
    assert library.gelu(special).isnan()[0]
    assert library.gelu(special)[1] == float("inf")


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7), (5, 300, 4), (0, 4)])
def test_gelu_beside_the_gradient(
    shape: tuple, dtype: torch.dtype, library: native.Library
) -> None:
    x, gradient = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    bias = torch.randn(shape[-1:]).to(dtype)
    exact = (x.double() + bias.double()).requires_grad_()
    expected = F.gelu(exact)
    torch.testing.assert_close(
        library.gelu(x, bias=bias).double(), expected.detach(), rtol=8e-3, atol=2e-4
    )
    (grad_x,) = torch.autograd.grad(expected, exact, gradient.double())
    after, grad_bias = library.gelu_pair_(x, bias, gradient)
    torch.testing.assert_close(after.double(), expected.detach(), rtol=8e-3, atol=2e-4)
    torch.testing.assert_close(gradient.double(), grad_x, rtol=8e-3, atol=2e-3)
    total = grad_x.flatten(0, -2).sum(0)
    atol = (1e-5 if dtype == torch.float32 else 1e-3) * x.shape[:-1].numel() ** 0.5
    torch.testing.assert_close(grad_bias.double(), total, rtol=1e-5, atol=atol)
    if dtype == torch.float32:
        assert (after - expected).abs().le(1e-6 * exact.abs().clamp(min=1)).all()
        assert (gradient - grad_x).abs().le(4e-6).all()


@needs_compiler
def test_gelu_of_all_bfloat16(library: native.Library) -> None:
    """Rounding a result changes it by 2^-8 of itself at most."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    exact = x.double().requires_grad_()
    expected = F.gelu(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    error = (library.gelu(x).double() - expected).abs()
    # Far out, 0 and x stand for values as near to them as this; without a table, see above.
    bound = (2**-8 + 4.5e-4) * expected.abs() + 1.3e-4 * (x < -4) + 1.2e-38
    assert (error <= bound + 3e-7 * exact.abs() * (x < -3)).all()
    ones, out = torch.ones_like(x), torch.empty_like(x)
    error = (library.level_backward(ones, None, None, x, None, out=out).double() - slope).abs()
    bound = 2**-8 * slope.abs() + 6e-6 + 3e-3 * ((x < -4) | (x > 3.5))
    assert (error <= bound)[x.abs() < 1e30].all()
    special = torch.tensor([float("nan"), float("inf"), 0.0, -0.0]).bfloat16()
    actual = library.gelu(special)
    assert not actual[:2].isfinite().any()
    assert actual[2:].abs().max() < 1e-12


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 6, 96), (700, 40), (0, 4)])
def test_layer_norm_and_its_gradients(
    shape: tuple, dtype: torch.dtype, library: native.Library
) -> None:
    x, gradient = ((3 * torch.randn(shape) + 1).to(dtype) for _ in range(2))
    norm = Affine(*(torch.randn(shape[-1]).to(dtype) for _ in range(2)), 1e-5)
    exact = [t.double().requires_grad_() for t in (x, *norm[:2])]
    expected = F.layer_norm(exact[0], shape[-1:], exact[1], exact[2], norm.eps)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    actual, statistics = library.norm(x, norm)
    grad_weight, grad_bias = library.norm_backward(
        gradient, x, norm.weight, statistics, out=gradient
    )
    if not len(x):
        assert not grad_weight.any()
        assert not grad_bias.any()
        return
    assert relative_error(actual, expected.detach()) <= TOLERANCE[dtype]
    torch.testing.assert_close(
        gradient.double(),
        wanted[0],
        rtol=0,
        atol=TOLERANCE[dtype] * float(1 + wanted[0].abs().max()),
    )
    assert relative_error(grad_weight, wanted[1]) <= 2e-5 if shape[-1] > 1 else True
    assert relative_error(grad_bias, wanted[2]) <= 2e-5


@needs_compiler
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 70, 40), (1, 300, 96)])
def test_gate_and_its_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, library: native.Library
) -> None:
    """The product of two layers written without their biases."""
    torch.manual_seed(0)
    query, modulator, gradient = (torch.randn(shape, dtype=dtype) for _ in range(3))
    q_bias, h_bias = (torch.randn(shape[-1], dtype=dtype) for _ in range(2))
    q = (query.double() + q_bias.double()).requires_grad_()
    m = (modulator.double() + h_bias.double()).requires_grad_()
    expected = torch.autograd.grad(q * m, (q, m), gradient.double())
    product = library.gate(query, q_bias, modulator, h_bias)
    assert relative_error(product, (q * m).detach()) < TOLERANCE[dtype]
    *grad_both, grad_q_bias, grad_h_bias = library.gate_backward_(
        gradient, query, q_bias, modulator, h_bias
    )
    assert grad_both[1] is gradient
    sums = [g.sum((0, 1)) for g in expected]
    for actual, wanted in zip(
        [*grad_both, grad_q_bias, grad_h_bias], [*expected, *sums], strict=True
    ):
        assert relative_error(actual, wanted) < TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 35, 6), (2, 70, 96), (1, 2048, 33)])
def test_gated_sum_and_its_gradient(
    shape: tuple, levels: int, dtype: torch.dtype, library: native.Library
) -> None:
    n, pixels, c = shape
    contexts = [torch.randn(shape).to(dtype) for _ in range(levels)]
    gates = torch.randn(n, pixels, levels + 1).to(dtype)
    shared, grad_sum = torch.randn(n, 1, c).to(dtype), torch.randn(shape).to(dtype)
    everything = torch.stack([*contexts, shared.expand(shape)], dim=-1).double()
    exact = gates.double().requires_grad_()
    expected = torch.einsum("npcl,npl->npc", everything, exact)
    (grad_gates,) = torch.autograd.grad(expected, exact, grad_sum.double())
    actual = library.gated_sum(contexts, gates, shared)
    assert relative_error(actual, expected.detach()) <= TOLERANCE[dtype]
    actual = library.gates_gradient(grad_sum, contexts, shared)
    assert relative_error(actual, grad_gates) <= TOLERANCE[dtype]
    # Not every row of a tile follows the one before it in memory.
    every_other = [context[:, ::2] for context in contexts]
    actual = library.gated_sum(every_other, gates[:, ::2], shared)
    assert relative_error(actual, expected.detach()[:, ::2]) <= TOLERANCE[dtype]


@needs_compiler
def test_bfloat16_is_rounded_to_nearest_even(library: native.Library) -> None:
    x = torch.tensor([1.0, 3.3895314e38, float("inf"), float("nan"), 1e-40]).bfloat16()
    x = torch.cat([x, torch.randn(1000).bfloat16()]).view(1, 1, -1, 1)
    factor = torch.tensor([1.0078125]).bfloat16().view(1, 1, 1, 1)
    expected = (x.float() * factor.float()).bfloat16()
    assert torch.equal(library.depthwise(x, factor).isnan(), expected.isnan())
    # CPUs that round by an instruction make subnormal values zero.
    torch.testing.assert_close(
        library.depthwise(x, factor), expected, rtol=0, atol=1.2e-38, equal_nan=True
    )
