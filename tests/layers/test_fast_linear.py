"""Linear layers by the fastest library equal PyTorch's, and leave special inputs to it."""

import copy

import pytest
import torch
from torch import nn

from focalnet_det.heads.fast_heads import use_fast_linears
from focalnet_det.layers import fast_linear
from focalnet_det.layers.fast_linear import FastLinear
from focalnet_det.ops.focal_block import policy
from tests.helpers.compare import relative_error
from tests.helpers.native_blocks import needs_compiler


@pytest.fixture
def model() -> nn.Module:
    """A model with a linear layer in its RoI heads and one elsewhere."""

    class Other(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Module()
    model.roi_heads = nn.Sequential(nn.Flatten(), nn.Linear(24, 30), nn.ReLU(), Other(30, 7))
    model.other = nn.Linear(3, 3)
    return model


@needs_compiler
def test_values_and_gradients(model: nn.Module) -> None:
    fast = use_fast_linears(copy.deepcopy(model))
    assert [type(m) for m in fast.roi_heads[1::2]] == [FastLinear, type(model.roi_heads[3])]
    assert type(fast.other) is nn.Linear
    assert list(fast.state_dict()) == list(model.state_dict())
    x = torch.randn(50, 4, 6)
    results = []
    for net, dtype in ((fast, torch.float32), (copy.deepcopy(model), torch.float64)):
        given = x.detach().to(dtype).requires_grad_()
        out = net.to(dtype).roi_heads(given)
        out.square().sum().backward()
        grads = [p.grad for p in net.roi_heads.parameters()]
        results.append([out.detach(), given.grad, *grads])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 2e-6


@needs_compiler
def test_what_is_left_to_pytorch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = use_fast_linears(model).roi_heads[1]
    calls = []
    function = fast_linear.products.linear
    monkeypatch.setattr(
        fast_linear.products, "linear", lambda *args: calls.append(1) or function(*args)
    )
    x = torch.randn(5, 24)
    layer(x)
    assert calls == [1]
    with policy.force_backend("torch"):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 30)
    layer.double()(x.double())
    assert calls == [1]
    with pytest.raises(RuntimeError, match="shapes"):
        layer.float()(x[:, :3])


def test_models_without_roi_heads() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert type(use_fast_linears(model)[0]) is nn.Linear
