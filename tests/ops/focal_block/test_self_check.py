"""Kernels that are wrong are found out at first use, with one warning, and not used."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from focalnet_det.backbones import fast_block
from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.cpu import library_build
from focalnet_det.ops.focal_block import policy, self_check
from tests.helpers.native_blocks import needs_compiler
from tests.helpers.random_blocks import block

tl = pytest.importorskip("triton.language", reason="Triton is missing")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is checked or remembered, and no backend is forced."""
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    for cached in (self_check.problem, policy._log):
        cached.cache_clear()
    yield
    for cached in (self_check.problem, policy._log):
        cached.cache_clear()


def test_the_reference_of_the_check_equals_the_model() -> None:
    module, x = block(2, 3, 8).eval(), torch.randn(2, 5, 6, 8)
    with torch.no_grad(), policy.force_backend("reference"):
        expected = module(x)
    torch.testing.assert_close(
        self_check.reference_block(x, fast_block.block_weights(module)), expected
    )


@needs_compiler
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_right_kernels_pass_once(
    dtype: torch.dtype, tmp_path: Path, library: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(tmp_path))
    assert self_check.problem("native", CPU, dtype) == ""
    assert len(json.loads((tmp_path / "checked-kernels.json").read_text())) == 1
    self_check.problem.cache_clear()  # as another process
    monkeypatch.setattr(self_check, "check", lambda *_: pytest.fail("checked again"))
    assert self_check.problem("native", CPU, dtype) == ""
    # Other kernels are checked again.
    self_check.problem.cache_clear()
    monkeypatch.setattr(native.library(), "key", "other")
    with pytest.raises(pytest.fail.Exception, match="checked again"):
        self_check.problem("native", CPU, dtype)


@needs_compiler
def test_wrong_kernels_in_cpp_are_not_used(
    tmp_path: Path, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(library_build.SOURCE.parent, tmp_path / "csrc")
    file = tmp_path / "csrc" / "depthwise.h"
    right = "sums[p] += tap * load(source + p * V);"
    assert right in file.read_text()
    file.write_text(file.read_text().replace(right, right.replace("p * V", "0")))
    monkeypatch.setattr(library_build, "SOURCE", tmp_path / "csrc" / "kernels.cpp")
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        module, x = block(2, 3, 8), torch.randn(1, 9, 12, 8)
        with torch.no_grad():
            results = [module(x), module(x)]
            with policy.force_backend("torch"):
                expected = module(x)
        assert isinstance(native.library(), native.Library)
        assert all(torch.equal(result, expected) for result in results)
        (message,) = warnings()
        assert message.startswith("The native kernels for float32 are not used: the result in")
        assert not (tmp_path / "cache" / "checked-kernels.json").exists()
        with torch.no_grad(), policy.force_backend("native"):  # who forces them gets them
            assert not torch.allclose(module(x), expected, rtol=1e-3)
    finally:
        native.library.cache_clear()


def test_wrong_triton_kernels_are_found_out(
    triton_path: None, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    from focalnet_det.ops.focal_block.triton import triton_launch, triton_norm

    monkeypatch.delenv(policy.VARIABLE)
    monkeypatch.setattr(self_check, "SHAPES", self_check.SHAPES[:1])
    assert self_check.check("triton", CPU, torch.float32) == ""

    @triton_launch.kernel()
    def wrong(
        gradient, x, weight, statistics, residual, grad_x, sums, steps, rows,
        C: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    ):  # fmt: skip
        """Writes the first channels alone."""
        tl.store(grad_x + tl.arange(0, 2), 1.0)

    monkeypatch.setattr(triton_norm, "norm_backward_kernel", wrong)
    monkeypatch.setattr(self_check, "_has_passed", lambda *_: False)
    assert "differs from plain PyTorch" in policy._check_problem("triton", CPU, torch.float32)
    (message,) = warnings()
    assert message.startswith("The triton kernels for float32 are not used: gradient ")
    assert policy._triton_problem(CPU, torch.float32)  # the policy asks again without a warning
    assert not warnings()
