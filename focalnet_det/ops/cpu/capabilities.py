"""Detect what the CPU can do: the only place that asks, for every choice that depends on it.

``FOCALNET_DET_CPU`` names another set of instructions than that of the CPU at hand, one of
:data:`LEVELS`: types are then chosen, and the kernels in C++ built, as on such a CPU.
"""

import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

VARIABLE = "FOCALNET_DET_CPU"
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Capabilities:
    """Instructions that choices depend on.

    Attributes:
        avx2, avx512: vectors of 256 and 512 bits.
        bfloat16, float16: arithmetic in 16 bits, in vectors or tile registers.
        amx: tile registers for bfloat16.
    """

    avx2: bool = False
    avx512: bool = False
    bfloat16: bool = False
    float16: bool = False
    amx: bool = False

    def computes(self, dtype: torch.dtype) -> bool:
        """Return whether products in a type are done by instructions, not emulated.

        Emulation in oneDNN takes ten times as long as float32.
        """
        if dtype == torch.bfloat16:
            return self.bfloat16
        return dtype != torch.float16 or self.float16


class Level(NamedTuple):
    """A named set of instructions.

    Attributes:
        capabilities: what it can do.
        flags: of a compiler that builds for it.
    """

    capabilities: Capabilities
    flags: tuple[str, ...]


_AVX512 = ("-march=x86-64-v4",)
_BF16 = (*_AVX512, "-mavx512bf16")
_FP16 = (*_BF16, "-mavx512fp16")
LEVELS: Mapping[str, Level] = {
    "none": Level(Capabilities(), ("-march=x86-64-v2",)),
    "avx2": Level(Capabilities(avx2=True), ("-march=x86-64-v3",)),
    "avx512": Level(Capabilities(avx2=True, avx512=True), _AVX512),
    "bf16": Level(Capabilities(avx2=True, avx512=True, bfloat16=True), _BF16),
    "fp16": Level(Capabilities(avx2=True, avx512=True, bfloat16=True, float16=True), _FP16),
    "amx": Level(
        Capabilities(avx2=True, avx512=True, bfloat16=True, float16=True, amx=True),
        (*_FP16, "-mamx-tile", "-mamx-bf16"),
    ),
}


@functools.cache
def cpu() -> Capabilities:
    """Return what to choose by: ``FOCALNET_DET_CPU``, else the CPU; decided once in a process.

    Raises: ValueError for an unknown name in the environment.
    """
    level = chosen_level()
    return detect() if level is None else level.capabilities


def chosen_level() -> Level | None:
    """Return the level that the environment names, None without one.

    Raises: ValueError for an unknown one.
    """
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in LEVELS:
        raise ValueError(f"{VARIABLE}={name}: must be one of {', '.join(LEVELS)}, or unset.")
    return None if name is None else LEVELS[name]


def detect() -> Capabilities:
    """Return what the CPU at hand can do."""
    names = _instructions()
    return Capabilities(
        avx2="avx2" in names,
        avx512={"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= names,
        bfloat16=bool({"avx512bf16", "amxbf16", "bf16"} & names),
        float16=bool({"avx512fp16", "amxfp16"} & names),
        amx={"amxtile", "amxbf16"} <= names,
    )


def missing(level: Level) -> list[str]:
    """Return the capabilities of a level that the CPU at hand lacks."""
    there = asdict(detect())
    return [name for name, needed in asdict(level.capabilities).items() if needed > there[name]]


def fingerprint() -> str:
    """Return what a library that is built for the CPU at hand depends on."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = {line for line in _cpuinfo() if line.startswith(wanted)}
    # Where the system says nothing, the machine's name keeps others from its libraries.
    known = sorted(lines | _instructions()) or [platform.node()]
    return "\n".join([platform.machine(), platform.processor(), *known])


def _instructions() -> set[str]:
    """Return names of instruction sets without underscores, which not all write alike."""
    if hasattr(torch.cpu, "get_capabilities"):
        names = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    else:
        # Older PyTorch has no such function.
        lines = (line for line in _cpuinfo() if line.startswith(("flags", "Features")))
        names = set(next(lines, "").partition(":")[2].split())
    return {name.replace("_", "") for name in names}


def _cpuinfo() -> list[str]:
    try:
        return CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return []
