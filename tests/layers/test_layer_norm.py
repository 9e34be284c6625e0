"""Layer norms in training against PyTorch's."""

import pytest
import torch
from torch import Tensor, nn

from focalnet_det.layers import layer_norm
from focalnet_det.layers.layer_norm import _LayerNorm
from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.focal_block import policy

needs_kernels = pytest.mark.skipif(
    isinstance(native.library(), native.BuildError),
    reason=f"no native kernels: {native.library()}",
)


def results(x: Tensor, norm: nn.Module, function: object) -> list[Tensor]:
    given = x.detach().requires_grad_()
    norm.zero_grad()
    out = function(given, norm) if callable(function) else norm(given)
    out.double().pow(3).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in [given, *norm.parameters()])]


def norm_of(channels: int, dtype: torch.dtype = torch.float32) -> nn.LayerNorm:
    torch.manual_seed(0)
    norm = nn.LayerNorm(channels, eps=1e-4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 5, 7, 96), (1, 1, 1, 3), (3, 40, 40, 17)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_as_pytorch(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    norm, x = norm_of(shape[-1], dtype), torch.randn(shape).to(dtype)
    double = norm_of(shape[-1]).to(dtype).double()
    expected = results(x.double(), double, None)
    for ours, wanted in zip(results(x, norm, layer_norm), expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@needs_kernels
def test_runs_in_training_alone_and_on_plain_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = _LayerNorm.apply
    monkeypatch.setattr(_LayerNorm, "apply", lambda *args: calls.append(1) or apply(*args))
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    norm, x = norm_of(8), torch.randn(2, 3, 8)
    layer_norm(x, norm)
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(layer_norm(x, norm), norm(x))
    hooked = norm_of(8)
    hooked.register_forward_hook(lambda *_: None)
    for other in (hooked, norm_of(8).double(), nn.Identity(), nn.LayerNorm((3, 8))):
        given = x.double() if other is not hooked and isinstance(other, nn.LayerNorm) else x
        given = given.to(next(iter(other.parameters()), given).dtype)
        assert torch.equal(layer_norm(given, other), other(given))
    monkeypatch.setenv(policy.VARIABLE, "reference")
    assert torch.equal(layer_norm(x, norm), norm(x))
    assert len(calls) == 1
