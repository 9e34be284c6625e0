"""Convolutions without overlap as matrix products, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalnet_det.layers import PatchEmbed
from focalnet_det.ops.cpu.patches import patch_product
from focalnet_det.ops.focal_block import policy
from tests.helpers.compare import relative_error


def products_run(module: PatchEmbed, x: Tensor) -> bool:
    """Whether the convolution itself is left out."""
    called = []
    forward = module.proj.forward
    module.proj.forward = lambda x: called.append(x) or forward(x)  # type: ignore[assignment]
    module(x)
    module.proj.forward = forward  # type: ignore[method-assign]
    return not called


@pytest.fixture(autouse=True)
def no_forced_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(policy.VARIABLE, raising=False)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("channels", "dim", "stride", "size"),
    [(3, 8, 4, (8, 12)), (6, 5, 2, (2, 2)), (7, 14, 2, (10, 6)), (1, 1, 3, (9, 3))],
)
def test_values_and_gradients_equal_the_convolution(
    channels: int, dim: int, stride: int, size: tuple, bias: bool, order: torch.memory_format
) -> None:
    x = torch.randn(2, channels, *size).contiguous(memory_format=order).requires_grad_()
    weight = torch.randn(dim, channels, stride, stride).requires_grad_()
    inputs = [x, weight, *([torch.randn(dim).requires_grad_()] if bias else [])]
    offset = inputs[2] if bias else None
    actual = patch_product(x, weight, offset, torch.float32)
    expected = F.conv2d(
        x.double(), weight.double(), None if offset is None else offset.double(), stride
    ).permute(0, 2, 3, 1)
    assert relative_error(actual.detach(), expected.detach()) <= 1e-5
    gradient = torch.randn_like(actual)
    for ours, wanted in zip(
        torch.autograd.grad(actual, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient.double()),
        strict=True,
    ):
        assert relative_error(ours, wanted) <= 1e-5


def test_gradcheck() -> None:
    inputs = (torch.randn(2, 3, 4, 6), torch.randn(5, 3, 2, 2), torch.randn(5))
    inputs = tuple(t.double().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(lambda *t: patch_product(*t, torch.float64), inputs)


def test_types_are_those_of_the_inputs_and_the_computation() -> None:
    x = torch.randn(1, 4, 4, 4).bfloat16().requires_grad_()
    weight = torch.randn(8, 4, 2, 2).bfloat16().requires_grad_()
    out = patch_product(x, weight, None, torch.float32)
    expected = F.conv2d(x.float(), weight.float(), None, 2).permute(0, 2, 3, 1)
    assert out.dtype == torch.float32
    assert relative_error(out.detach(), expected.detach()) <= 1e-5
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_what_is_kept_are_the_inputs_themselves() -> None:
    x = torch.randn(1, 4, 8, 8).requires_grad_()
    layer = nn.Conv2d(4, 8, 2, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        patch_product(x, layer.weight, layer.bias, torch.float32)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), layer.weight.data_ptr()}


def test_frozen_weights_and_images_get_no_gradient() -> None:
    layer = nn.Conv2d(3, 8, 4, 4).requires_grad_(False)
    layer.bias.requires_grad_(True)
    x = torch.randn(1, 3, 8, 8)
    patch_product(x, layer.weight, layer.bias, torch.float32).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((8,), 4.0))


def test_second_derivatives_are_an_error() -> None:
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    out = patch_product(x, torch.randn(4, 3, 2, 2), None, torch.float32).pow(2).sum()
    (grad_x,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_embedding_with_and_without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    module = PatchEmbed(6, 8, stride=2)
    x = torch.randn(2, 6, 7, 9)
    assert products_run(module, x)
    results = module(x)
    results.sum().backward()
    gradients = [p.grad for p in module.parameters()]
    monkeypatch.setenv(policy.VARIABLE, "reference")
    assert not products_run(module, x)
    module.zero_grad()
    expected = module(x)
    expected.sum().backward()
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)
    for ours, parameter in zip(gradients, module.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-5)


def test_when_products_run() -> None:
    x = torch.randn(1, 6, 8, 8)
    module = PatchEmbed(6, 8, stride=2)
    assert products_run(module, x)
    assert not products_run(module.double(), x.double())
    assert not products_run(PatchEmbed(6, 8, stride=2, overlap_kernel=3, overlap_padding=1), x)
    hooked = PatchEmbed(6, 8, stride=2)
    hooked.proj.register_forward_hook(lambda *_: None)
    assert not products_run(hooked, x)
    with torch.no_grad():
        assert not products_run(PatchEmbed(6, 8, stride=2), x)
        assert products_run(PatchEmbed(6, 24, stride=2), x)


def test_another_number_of_channels_is_named() -> None:
    with pytest.raises(RuntimeError, match="expected input.* to have 6 channels, but got 4"):
        PatchEmbed(6, 8, stride=2)(torch.randn(1, 4, 8, 8))
