"""Residual sums inside the branches, with stochastic depth, against the reference."""

import pytest
import torch
from torch import Tensor

from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.focal_block import policy
from focalnet_det.ops.focal_block.pytorch import tiles
from tests.helpers.compare import relative_error
from tests.helpers.random_blocks import block


@pytest.mark.parametrize("path", ["torch", "native"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tile", [16, 100, 2048, None])
def test_stochastic_depth_drops_the_same_branches(
    path: str,
    autocast: bool,
    tile: int | None,
    every_cpu: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles are parts of an image, several images, or all, of which some lose a branch.

    Without tiles a branch may be one call.
    """
    if path == "native" and isinstance(native.library(), native.BuildError):
        pytest.skip(f"no native kernels: {native.library()}")
    if tile is not None:
        monkeypatch.setattr(tiles, "TILE", tile)
        monkeypatch.setattr(policy, "LARGEST_MAP", 0)
    module = block(2, 3, drop_path_rate=0.5).train()
    x = torch.randn(6, 5, 9, 8)

    def run(path: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        monkeypatch.setenv(policy.VARIABLE, path)
        torch.manual_seed(3)
        module.zero_grad()
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = module(given)
        assert out.dtype == torch.float32
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in [given, *module.parameters()])]

    expected = run("reference")
    actual = run(path, torch.bfloat16 if autocast else torch.float32)
    untouched = [
        bool((image == before).all()) for image, before in zip(expected[0], x, strict=True)
    ]
    moved = [bool((image != before).any()) for image, before in zip(actual[0], x, strict=True)]
    assert any(untouched)
    assert moved == [not same for same in untouched]
    for ours, wanted in zip(actual, expected, strict=True):
        assert relative_error(ours, wanted) < (5e-2 if autocast else 1e-5)
