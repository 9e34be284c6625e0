"""Compile and disassemble the Triton kernels for a GPU, without needing one."""

import contextlib
import dataclasses
import importlib.util
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..backbones.focalnet import FocalNetBlock

# Constants that distinguish the programs of a kernel.
_CONSTANTS = ("C", "K", "N", "CHANNELS", "ROWS", "COLUMNS", "HIDDEN", "LAST", "KEEP", "PADDED")


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel compiled for one dtype, size and tile configuration.

    Attributes:
        kernel: name of the function.
        constants: some of its compile-time constants.
        warps: per program instance.
        registers: per thread.
        spilled: bytes per thread that do not fit into registers.
        shared: bytes of shared memory.
        instructions: total number.
        multiply_adds: fraction of FFMA in the innermost loop with the most; 0 without loops.
        narrow_loads: number of 16-bit global loads.
        seconds: compile time.
    """

    kernel: str
    constants: dict[str, int]
    warps: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    multiply_adds: float
    narrow_loads: int
    seconds: float


class _Launch(NamedTuple):
    name: str
    constants: dict[str, Any]
    compiled: Any
    seconds: float


def compile_kernels(
    channels: int,
    kernels: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    capability: int = 90,
) -> list[Program]:
    """Compile every kernel that a block launches in inference and training.

    No GPU is needed: the block runs on a few pixels on the CPU, and instead of launching a kernel,
    all of its tile configurations are compiled.

    Args:
        channels: of the block.
        kernels: kernel sizes of its focal levels, such as 3 and 5.
        dtype: of the computation.
        capability: compute capability of the GPU times 10, such as 90 for Hopper.

    Raises:
        ImportError: without Triton.
        ValueError: for invalid sizes, or if kernels are interpreted instead of compiled.
    """
    _check_compilable(channels, kernels)
    block = FocalNetBlock(
        channels, focal_level=len(kernels), focal_window=kernels[0], mlp_ratio=4.0,
        post_norm=False, post_norm_in_modulation=False, layer_scale=None,
        normalize_modulator=False, drop_rate=0.0, drop_path_rate=0.0,
    ).to(dtype)  # fmt: skip
    x = torch.randn(2, 8, 16, channels, dtype=dtype)
    with _compiling(capability, dtype) as launches:
        with torch.no_grad():
            block.eval()(x)
        block.train()(x.float().requires_grad_()).sum().backward()
    return [_program(launch) for launch in launches.values()]


def _check_compilable(channels: int, kernels: Sequence[int]) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ImportError("Triton is not installed. It comes with PyTorch for Linux.")
    from ..ops.focal_block.triton.triton_launch import INTERPRETED

    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, so kernels are not compiled. Unset it.")
    first = kernels[0] if kernels else 0
    are_consecutive = list(kernels) == list(range(first, first + 2 * len(kernels), 2))
    if channels < 1 or first < 1 or first % 2 == 0 or not are_consecutive:
        raise ValueError(
            "At least 1 channel and consecutive odd kernel sizes, such as 3 5 7, are required."
        )


@contextlib.contextmanager
def _compiling(capability: int, dtype: torch.dtype) -> Iterator[dict[str, _Launch]]:
    """Compile kernels for a GPU instead of launching them, with all configurations."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from ..ops.focal_block import policy
    from ..ops.focal_block.triton import triton_block, triton_launch, triton_linear

    launches: dict[str, _Launch] = {}
    compiled_by = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, **constants: Any) -> Any:
        constants.pop("warmup")
        start = time.perf_counter()
        compiled = compiled_by(self, *args, grid=grid, warmup=True, **constants)
        seconds = time.perf_counter() - start
        launches.setdefault(
            compiled.hash, _Launch(self.__name__, constants, compiled, round(seconds, 2))
        )
        return compiled

    def compile_all(self: Any, *args: Any, **constants: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **constants, **config.all_kwargs())

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (driver, "_active" if hasattr(driver, "_active") else "active", _driver(capability)),
            (JITFunction, "run", compile_only),
            (Autotuner, "run", compile_all),
            (triton_launch.Kernel, "reuse", False),
            (triton_block, "fastest", _run_both),
            (triton_linear, "fastest", _run_both),
            (policy, "choose_backend", lambda *_, **__: "triton"),
            (policy, "compute_dtype", lambda _: (dtype, dtype)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield launches


def _driver(capability: int) -> SimpleNamespace:
    """Return a driver of Triton that names a GPU which is not there."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,
        get_current_stream=lambda _: 0,
        get_benchmarker=lambda: None,
    )


def _run_both(_: Any, __: Any, fused: Any, separate: Any) -> Any:
    """Run both of the forms that a launch chooses from, instead of the faster one."""
    separate()
    return fused()


def _program(launch: _Launch) -> Program:
    instructions, loops = _disassemble(launch.compiled.asm["cubin"])
    loads = [line for line in instructions if "LDG" in line]
    usage = _run("cuobjdump", launch.compiled.asm["cubin"], "-res-usage")
    registers, spilled = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    return Program(
        kernel=launch.name,
        constants={
            key: int(launch.constants[key]) for key in _CONSTANTS if key in launch.constants
        },
        warps=launch.compiled.metadata.num_warps,
        registers=registers,
        spilled=spilled,
        shared=launch.compiled.metadata.shared,
        instructions=len(instructions),
        multiply_adds=max((Counter(loop)["FFMA"] / len(loop) for loop in loops), default=0.0),
        narrow_loads=sum(".U16" in line for line in loads),
        seconds=launch.seconds,
    )


def _disassemble(binary: bytes) -> tuple[list[str], list[list[str]]]:
    """Return the instructions, and the operations of each innermost loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in _run("nvdisasm", binary, "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    loops = []
    for end, line in enumerate(instructions):
        branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)
        # The last instruction jumps to itself.
        if branch and labels.get(branch[1], end) < end:
            loops.append((labels[branch[1]], end))
    operation = re.compile(r"(?:@!?U?PT?\d*\s+)?([A-Z0-9]+)")
    operations = [operation.match(line)[1] for line in instructions]  # type: ignore[index]
    return instructions, [
        operations[first : last + 1]
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]


def _run(tool: str, binary: bytes, option: str) -> str:
    """Run a tool that ships with Triton on a program, and return its output."""
    import triton

    folder_of_tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [str(folder_of_tools / tool), option, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
