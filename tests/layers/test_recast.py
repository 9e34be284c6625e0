"""Modules replaced in a built model by subclasses that share everything with them."""

import copy

import torch
from torch import Tensor, nn

from focalnet_det.layers.recast import recast, replace_modules, set_submodule


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Other(nn.Linear):
    pass


def test_everything_is_shared() -> None:
    linear = nn.Linear(3, 2)
    linear.note = [1]
    doubled = recast(linear, Doubled)
    assert type(linear) is nn.Linear
    assert type(doubled) is Doubled
    assert doubled.weight is linear.weight
    assert doubled.note is linear.note
    x = torch.randn(4, 3)
    assert torch.equal(doubled(x), 2 * linear(x))


def test_only_the_named_classes_are_replaced() -> None:
    shared, other = nn.Linear(2, 2), Other(2, 2)
    model = nn.Sequential(shared, nn.Sequential(other, shared), nn.ReLU())
    before = model.state_dict()
    assert replace_modules(model, {nn.Linear: Doubled}) is model
    assert [type(m) for m in model[1]] == [Other, Doubled]
    assert model[0] is model[1][1]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(),
                                                 strict=True))  # fmt: skip
    assert type(copy.deepcopy(model)[0]) is Doubled
    whole = replace_modules(shared, {nn.Linear: Doubled})
    assert type(whole) is Doubled


def test_one_submodule() -> None:
    net = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), nn.Linear(1, 1))})
    set_submodule(net, "a.1", nn.Tanh())
    set_submodule(net, "a.0", nn.GELU())
    assert [type(m) for m in net["a"]] == [nn.GELU, nn.Tanh]
