"""The Triton kernels as GPUs would get them: compiled in a process that does not interpret them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from focalnet_det.benchmark.gpu_code import compile_kernels
from focalnet_det.ops.focal_block.triton import (
    triton_depthwise,
    triton_gradients,
    triton_launch,
    triton_linear,
    triton_mlp,
    triton_norm,
    triton_pointwise,
)
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_program

TOOL = ROOT / "tools" / "inspect_kernels.py"
MODULES = (
    triton_depthwise, triton_gradients, triton_linear, triton_mlp, triton_norm, triton_pointwise,
)  # fmt: skip
# Of a program, at most, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def inspect(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(TOOL), *arguments, "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "dtype", "capability"), [(96, "bfloat16", 90), (20, "float16", 80)]
)
def test_every_kernel_compiles_and_fits(
    channels: int, dtype: str, capability: int, tmp_path: Path
) -> None:
    result = inspect(
        tmp_path, "--channels", str(channels), "--kernels", "3", "5", "--dtype", dtype,
        "--capability", str(capability),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    programs = json.loads(result.stdout)
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert {program["kernel"] for program in programs} == kernels
    for program in programs:
        assert 0 < program["registers"] <= 255, program
        assert program["spilled"] == 0, program
        assert program["shared"] <= SHARED_MEMORY[capability], program
        # Maps are read 16 bytes at a time where channels allow it, only gates one by one.
        assert program["narrow_loads"] <= 16 or channels % 8, program
    if channels % 8 == 0:
        convolutions = {"level_kernel": 0.45, "level_backward_kernel": 0.45, "weight_kernel": 0.33}
        for kernel, share in convolutions.items():
            found = [one["multiply_adds"] for one in programs if one["kernel"] == kernel]
            assert max(found) >= share, kernel


@pytest.mark.parametrize("kernels", [(3, 7), (4, 6), ()])
def test_kernels_that_no_block_has_are_refused(
    kernels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="consecutive odd kernel sizes"):
        compile_kernels(8, kernels)


def test_the_tool_reports_bad_input_in_one_line(tmp_path: Path) -> None:
    result = run_program(TOOL, "--kernels", 3, 7, "--json", TRITON_INTERPRET="0")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: At least 1 channel and consecutive odd kernel sizes")
    assert result.stderr.count("\n") == 1
