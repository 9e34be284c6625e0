"""Layer norms in Triton and their gradients."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from focalnet_det.ops.focal_block.weights import Affine
from tests.helpers.compare import relative_error

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from tests.helpers.triton_blocks import DEVICE, TOLERANCE

pytestmark = [pytest.mark.usefixtures("triton_path")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)  # `make gpu-test` runs them too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 33), (5000, 3), (2, 40, 130)])
def test_layer_norm_in_another_type_and_its_gradients(
    shape: tuple[int, ...], added: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row, and of more rows than one tile of each part has."""
    from focalnet_det.ops.focal_block.triton import triton_common, triton_norm

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
