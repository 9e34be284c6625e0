"""Deformable attention's Triton kernels against the reference: interpreted, or on a GPU."""

import importlib.util

import pytest
import torch
from torch import Tensor

from focalnet_det.ops.deformable_attention import choose_backend, deformable_attention
from focalnet_det.ops.focal_block import policy

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU, `make gpu-test` runs them too.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# Largest difference over the largest value; the reference computes in double precision.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(5, 7), (0, 3), (1, 1), (3, 2)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    # Half of the interpreter's time goes into checks for overflow of offsets, small ones here.
    quick = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)


def problem(
    shapes: list[tuple[int, int]], queries: int, channels: int, spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations, also outside, and weights of 2 images, 2 heads and 2 points."""
    value = torch.randn(2, sum(h * w for h, w in shapes), 2, channels, device=DEVICE)
    locations = torch.rand(2, queries, 2, len(shapes), 2, 2, device=DEVICE)
    locations = 0.5 + spread * (locations - 0.5)
    return value, locations, torch.randn(locations.shape[:-1], device=DEVICE)


def results(
    tensors: tuple[Tensor, ...], shapes: list[tuple[int, int]], backend: str
) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in tensors]
    out = deformable_attention(inputs[0], shapes, *inputs[1:], backend=backend)
    (out.double() * torch.arange(out.shape[-1], device=DEVICE).sin()).sum().backward()
    return [out, *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize(
    ("dtype", "queries", "channels", "spread"),
    [
        (torch.float32, 4, 6, 1.6),
        (torch.float32, 19, 32, 1.1),
        (torch.float32, 1, 1, 30.0),
        (torch.bfloat16, 4, 6, 1.1),
        (torch.float16, 4, 6, 1.1),
    ],
)
def test_values_and_gradients_are_those_of_the_reference(
    dtype: torch.dtype, queries: int, channels: int, spread: float
) -> None:
    value, locations, weights = problem(SHAPES, queries, channels, spread)
    value = value.to(dtype)
    actual = results((value, locations, weights), SHAPES, "triton")
    exact = tuple(x.double() for x in (value, locations, weights))
    expected = results(exact, SHAPES, "reference")
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32, torch.float32]
    for name, a, b in zip(("out", "value", "locations", "weights"), actual, expected, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9)
        assert error <= TOLERANCE[dtype], name


def test_nothing_to_do() -> None:
    value, locations, weights = problem([(2, 2)], 0, 4, 1.0)
    assert deformable_attention(value, [(2, 2)], locations, weights, "triton").shape == (2, 0, 8)


def test_order_device_and_type_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(policy.VARIABLE, "triton")
    value = torch.zeros(1, 1, 1, 1, device=DEVICE)
    assert choose_backend(value) == "triton"
    assert choose_backend(value.double()) != "triton"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_backend(value) != "triton"


def test_it_is_a_registered_operator() -> None:
    from focalnet_det.ops.deformable import triton_deformable

    value, locations, weights = problem([(3, 2)], 3, 4, 1.0)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    torch.library.opcheck(
        triton_deformable._deformable,
        (inputs[0], [3, 2], *inputs[1:]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
