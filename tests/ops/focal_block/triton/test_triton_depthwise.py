"""A focal level in Triton, its gradients and means, against convolutions in double precision."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.compare import relative_error

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from tests.helpers.triton_blocks import DEVICE

pytestmark = [pytest.mark.usefixtures("triton_path")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)  # `make gpu-test` runs them too


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    out = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
    return out.permute(0, 2, 3, 1)


# Maps smaller than the window; more pixels and channels than a tile has, none a multiple of it.
SHAPES = [
    (1, (1, 1, 1, 3)),
    (3, (2, 5, 17, 33)),
    (5, (1, 17, 20, 8)),
    (7, (2, 9, 30, 5)),
    (15, (1, 1, 2, 8)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_a_level(size: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from focalnet_det.ops.focal_block.triton import triton_depthwise as depthwise
    from focalnet_det.ops.focal_block.triton.triton_prepared import taps

    monkeypatch.setattr(depthwise, "PROGRAMS", 5)
    n, h, w, c = shape
    wide = torch.randn(n, h, w, c + 8, device=DEVICE)
    x, gates = wide[..., :c], wide[..., c:]
    before, pre, outer = (torch.randn(shape, device=DEVICE) for _ in range(3))
    kernel = torch.randn(c, 1, size, size, device=DEVICE) / size
    written = torch.full_like(before, torch.nan)
    total, after, partial = depthwise.level(
        x, taps(kernel), gates, 3, 2.0, before, None, written, post=True
    )
    wanted = correlate(x.double(), kernel.double())
    context = F.gelu(wanted)
    assert relative_error(written, wanted) <= 1e-5
    assert relative_error(after, context) <= 1e-5
    assert relative_error(total, before + context * gates[..., 3:4] / 2) <= 1e-5
    mean, shared = depthwise.mean(partial, h * w)
    assert relative_error(mean, context.mean((1, 2))) <= 1e-5
    assert relative_error(shared, F.gelu(context.mean((1, 2)))) <= 1e-5

    leaf, tap = x.double().requires_grad_(), kernel.double().requires_grad_()
    grad_x, grad_kernel = torch.autograd.grad(correlate(leaf, tap), (leaf, tap), outer.double())
    target = torch.full((n, h, w, c + 8), torch.nan, device=DEVICE)
    depthwise.level_backward(outer, kernel, None, target[..., 8:])
    assert relative_error(target[..., 8:], grad_x) <= 1e-5
    assert target[..., :8].isnan().all(), "written beside the target"
    assert relative_error(depthwise.weight_gradient(x, outer, size), grad_kernel) <= 1e-5
    depthwise.level_backward(outer, kernel, None, written, (gates, 3, 2.0, before, pre))
    slope = torch.func.vmap(torch.func.grad(F.gelu))(pre.double().flatten()).view(shape)
    assert relative_error(written, (grad_x + before * gates[..., 3:4] / 2) * slope) <= 1e-5


def test_means_of_many_tiles() -> None:
    from focalnet_det.ops.focal_block.triton import triton_depthwise as depthwise

    partial = torch.randn(2, 70, 5, device=DEVICE)
    area = torch.tensor([7.0, 9.0], device=DEVICE)
    mean, shared = depthwise.mean(partial, area)
    assert relative_error(mean, partial.double().sum(1) / area[:, None]) <= 1e-5
    assert relative_error(shared, F.gelu(partial.double().sum(1) / area[:, None])) <= 1e-5
