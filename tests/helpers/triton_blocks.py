"""Blocks on the path of the Triton kernels, and on the reference in double precision."""

import torch
from torch import Tensor

from focalnet_det.backbones.focalnet import FocalNetBlock
from focalnet_det.ops.focal_block import policy
from tests.helpers.compare import relative_error
from tests.helpers.random_blocks import block as random_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Largest difference over the largest value; the reference computes in double precision.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def block(dim: int, levels: int, window: int, **flags: object) -> FocalNetBlock:
    return random_block(levels, window, dim, **{"mlp_ratio": 2.0} | flags).to(DEVICE)


def results(
    module: FocalNetBlock, x: Tensor, valid: Tensor | None, inference: bool
) -> dict[str, Tensor]:
    """Output with and, if that is asked for, without autograd, and all gradients."""
    found = {}
    if inference:
        with torch.no_grad():
            found["inference"] = module(x, valid)
    x = x.detach().requires_grad_()
    module.zero_grad()
    found["output"] = module(x, valid)
    found["output"].float().pow(2).sum().backward()
    found["x"] = x.grad
    return found | {key: p.grad.clone() for key, p in module.named_parameters()}


def assert_equal_to_reference(
    module: FocalNetBlock,
    x: Tensor,
    valid: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    inference: bool = True,
) -> None:
    module, x = module.to(dtype), x.to(DEVICE, dtype)
    path = policy.choose_backend(x, windows=module.modulation.focal_windows)
    assert path == "triton"
    actual = results(module, x, valid, inference)
    # In double precision the reference runs whatever is forced.
    mask = None if valid is None else valid.double()
    expected = results(module.double(), x.double(), mask, inference)
    for key, value in expected.items():
        assert actual[key].dtype == dtype
        assert relative_error(actual[key], value) <= TOLERANCE[dtype], key
