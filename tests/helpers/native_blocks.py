"""Kernels in C++: whether they can be built here, and blocks that run on them."""

import os
import shutil

import pytest
import torch
from torch import Tensor

from focalnet_det.backbones import fast_block
from focalnet_det.backbones.focalnet import FocalNetBlock
from focalnet_det.ops.cpu import library_build as native_build
from focalnet_det.ops.focal_block import policy

COMPILER = os.environ.get("CXX") or next(filter(shutil.which, native_build.COMPILERS), None)

needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason=f"no C++ compiler: none of {', '.join(native_build.COMPILERS)} nor CXX"
)


def run(module: FocalNetBlock, x: Tensor, valid: Tensor | None, path: str) -> dict[str, Tensor]:
    """Output without and with autograd, and all gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(policy.VARIABLE, path)
        assert policy.choose_backend(x, exact=lambda: fast_block.is_plain(module)) == path
        x = x.detach().requires_grad_()
        module.zero_grad()
        with torch.no_grad():
            results = {"inference": module(x, valid)}
        results["output"] = module(x, valid)
        results["output"].float().pow(3).sum().backward()
        results["output"] = results["output"].detach()
    results["x"] = x.grad
    return results | {key: p.grad.clone() for key, p in module.named_parameters()}
