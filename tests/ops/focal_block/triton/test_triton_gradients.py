"""Gradients in Triton and their sums, and GELU in its tails."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.compare import relative_error

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from tests.helpers.triton_blocks import DEVICE

pytestmark = [pytest.mark.usefixtures("triton_path")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)  # `make gpu-test` runs them too


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 5, 9, 33), (1, 6, 7, 130)])
def test_gradients_and_their_sums(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer pixels than a tile has, and of several tiles in each of two parts."""
    from focalnet_det.ops.focal_block.triton import triton_common, triton_gradients

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
    from focalnet_det.ops.focal_block.triton import triton_gradients

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
