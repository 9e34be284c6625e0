"""The fused branches as registered operators: checks, compilation, export, checkpointing."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from focalnet_det import create_backbone
from focalnet_det.backbones import FocalNet
from focalnet_det.ops.focal_block import autograd, policy
from focalnet_det.ops.focal_block.weights import (
    Affine,
    BlockWeights,
    MlpWeights,
    ModulationWeights,
    flatten_mlp,
    flatten_modulation,
)
from tests.helpers.compare import relative_error

DIM, LEVELS = 4, 2


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def affine(outputs: int, inputs: int) -> Affine:
    return Affine(torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs))


def norm() -> Affine:
    return Affine(torch.rand(DIM) + 0.5, torch.randn(DIM), 1e-5)


def weights() -> BlockWeights:
    modulation = ModulationWeights(
        f=affine(2 * DIM + LEVELS + 1, DIM),
        h=affine(DIM, DIM),
        proj=affine(DIM, DIM),
        ln=norm(),
        kernels=[torch.randn(DIM, 1, k, k) / k for k in (3, 5)],
        normalize=True,
    )
    mlp = MlpWeights(affine(8, DIM), affine(DIM, 8))
    return BlockWeights(norm(), modulation, torch.rand(DIM), norm(), mlp, torch.rand(DIM), False)


def learned(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_operators_are_registered_as_pytorch_wants(masked: bool, recompute: bool) -> None:
    x = torch.randn(2, 3, 5, DIM, requires_grad=True)
    valid = torch.ones(2, 3, 5, 1) if masked else None
    plan, every = ("torch", torch.float32, torch.float32), weights()
    modulation, layout = flatten_modulation(every.norm1, every.modulation)
    mlp, eps = flatten_mlp(every.norm2, every.mlp)
    operators = torch.ops.focalnet_det
    check = torch.library.opcheck
    check(operators.modulation, (x, valid, learned(modulation), *layout, *plan, recompute))
    if not masked:
        check(operators.mlp, (x, learned(mlp), eps, *plan, recompute))
    x, modulation, mlp = x.detach(), [t.detach() for t in modulation], [t.detach() for t in mlp]
    _, kept = operators.modulation(x, valid, modulation, *layout, *plan, recompute)
    assert bool(kept) != recompute
    gradient = torch.randn_like(x)
    check(
        operators.modulation_backward,
        (gradient, x, valid, modulation, kept, *layout, *plan, recompute),
    )
    if not masked:
        _, kept = operators.mlp(x, mlp, eps, *plan, recompute)
        check(operators.mlp_backward, (gradient, x, mlp, kept, eps, *plan, recompute))
    gammas = [torch.rand(DIM), torch.rand(DIM)]
    check(operators.block, (x, valid, modulation, mlp, gammas, *layout, eps, True, *plan[:2]))


def network(**options: object) -> FocalNet:
    arguments = {
        "embed_dim": 8,
        "depths": (1, 1, 1, 1),
        "out_features": ("stage1",),
        "drop_path_rate": 0.0,
    }
    return create_backbone("focalnet_tiny_lrf", **arguments | options)


class Seen(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.add(str(operator))
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("masked", [False, True])
def test_operators_run_where_somebody_intercepts_them(masked: bool) -> None:
    net, x = network(valid_context=masked), torch.randn(2, 3, 32, 32)
    options = {"image_sizes": [(32, 32), (20, 30)]} if masked else {}
    results, seen = [], Seen()
    for mode in (nullcontext(), seen):
        with mode:
            results.append(gradients(net, lambda x: net(x, **options), x))
            with torch.no_grad():
                results[-1]["inference"] = net.eval()(x, **options)["stage1"]
            net.train()
    plain, intercepted = results
    # Operators leave the residual sums to PyTorch, which rounds elsewhere.
    for key, expected in plain.items():
        assert relative_error(intercepted[key], expected) < 2e-5, key
    names = {name.split(".")[1] for name in seen.names if name.startswith("focalnet_det.")}
    assert names == {"modulation", "modulation_backward", "mlp", "mlp_backward", "block"}


def targets(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if "focalnet_det" in str(node.target)}


def gradients(net: FocalNet, run: object, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    feature = run(x)["stage1"]
    feature.float().pow(3).mean().backward()
    return {"output": feature.detach()} | {k: p.grad.clone() for k, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.bfloat16), ({"lean_training": True, "activation_checkpointing": True}, None)],
)
def test_compiled_training(options: dict, dtype: torch.dtype | None) -> None:
    net, nodes = network(**options), []

    def backend(module: torch.fx.GraphModule, inputs: list) -> object:
        nodes.append(targets(module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    graphs = []
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    for size in ((64, 96), (33, 70)):
        x = torch.randn(2, 3, *size)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected, actual = gradients(net, net, x), gradients(net, compiled, x)
        for key, value in expected.items():
            # The stem alone differs: in a graph it is a stock layer, which rounds more often.
            tolerance = 1e-5 if dtype is None else 3e-2
            difference = (actual[key] - value).abs().max() / value.abs().max()
            assert difference <= tolerance, (key, size)
        graphs.append(len(nodes))
    assert graphs[0] == graphs[1], "recompiled for another size"
    if not options:
        assert all(each == {"focalnet_det.modulation", "focalnet_det.mlp"} for each in nodes)


@torch.no_grad()
@pytest.mark.parametrize("forced", [None, "torch"])
def test_export_has_stock_operators_unless_told_otherwise(
    forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network().eval()
    if forced:
        monkeypatch.setenv(policy.VARIABLE, forced)
    auto = torch.export.Dim.AUTO
    shapes = ({2: auto, 3: auto},)
    program = torch.export.export(net, (torch.randn(2, 3, 64, 96),), dynamic_shapes=shapes)
    assert targets(program.graph) == ({"focalnet_det.block.default"} if forced else set())
    for size in ((97, 131), (33, 33)):
        x = torch.randn(2, 3, *size)
        expected = net(x)["stage1"]
        actual = program.module()(x)["stage1"]
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_checkpointing_gives_the_same_gradients() -> None:
    net = network(depths=(2, 1, 1, 1))
    x = torch.randn(1, 3, 40, 52)
    expected = gradients(net, net, x)
    net.layers[0].activation_checkpointing = True
    actual = gradients(net, net, x)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_a_frozen_input_needs_no_gradient() -> None:
    every = weights()
    parameters, layout = flatten_modulation(every.norm1, every.modulation)
    modulation = every.modulation._replace(f=Affine(*learned(list(every.modulation.f[:2]))))
    x = torch.randn(1, 3, 4, DIM)
    plan = autograd.ComputePolicy("torch", torch.float32, torch.float32)
    autograd.modulation(x, every.norm1, modulation, None, plan).sum().backward()
    assert modulation.f.weight.grad is not None
    assert all(tensor.grad is None for tensor in (x, parameters[0], modulation.h.weight))
    assert layout.ln_eps == 1e-5
