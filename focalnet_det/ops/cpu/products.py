"""Choose what computes float32 matrix products on CPUs, by measurement.

Three engines compute the same: ``tiles``, the register tiles of ``csrc/products.h``; ``mkl``, the
library behind ``torch.mm``; ``onednn``, the library behind 1x1 convolutions. Which is fastest
depends on the CPU and on the shape: MKL keeps AMD CPUs below what they can do, for example. The
first product of a class of shapes is measured, in some milliseconds, with all engines, and the
choice is kept on disk beside the kernels, by CPU, PyTorch and kernels: later processes repeat it,
so results do not change from run to run. Where nothing can be kept, nothing is measured and
``tiles`` computes. ``FOCALNET_DET_PRODUCTS`` forces an engine.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...atomic import replacing
from . import capabilities, library_cache, structs
from .library import Library, library

VARIABLE = "FOCALNET_DET_PRODUCTS"
ENGINES = ("tiles", "onednn", "mkl")
# Engines that kernels in C++ can call, and their numbers in csrc/products.h.
NATIVE_ENGINES = {"tiles": 0, "mkl": 1}
# A product is measured with as many rows as take about this many operations.
OPERATIONS = 1e8
FEW_ROWS, LEAST_ROWS, MOST_ROWS = (32, 256), 192, 4096
REPEATS = 5
# Another engine must be faster than ``tiles`` by this factor: repeats differ by less.
MARGIN = 1.05

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """Class of products with one choice: a product with canonical sides.

    Attributes:
        kind: ``forward`` (x w^T), ``input`` (gradient w) or ``weight`` (gradient^T x).
        rows: number of pixels or boxes: m of the former two, k of the latter.
        outputs, inputs: sides of the weight.
    """

    kind: str
    rows: int
    outputs: int
    inputs: int

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return factors of the product, (m, k) and (k, n), with random values."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.inputs, generator=generator)
        gradient = torch.randn(self.rows, self.outputs, generator=generator)
        weight = torch.randn(self.outputs, self.inputs, generator=generator)
        if self.kind == "forward":
            return x, weight.T
        return (gradient, weight) if self.kind == "input" else (gradient.T, x)


def shape_class(kind: str, rows: int, outputs: int, inputs: int) -> Shape:
    """Return the class of a product: sides of three quarters of a power of two.

    Those are the sides of FocalNet-T and S; other products have a class of similar sides.
    """
    outputs, inputs = _canonical(outputs), _canonical(inputs)
    for few in FEW_ROWS:
        if rows <= few:
            return Shape(kind, few // 2, outputs, inputs)
    wanted = int(OPERATIONS / (2 * outputs * inputs))
    return Shape(kind, min(max(wanted, LEAST_ROWS), MOST_ROWS), outputs, inputs)


def _canonical(side: int) -> int:
    return 3 * 2 ** max(math.ceil(math.log2(max(side, 1))) - 2, 0)


def forced_engine() -> str | None:
    """Return the engine that the environment forces, None without one.

    Raises: ValueError for an unknown engine.
    """
    engine = os.environ.get(VARIABLE) or None
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"{VARIABLE}={engine}: must be one of {', '.join(ENGINES)}, or unset.")
    return engine


def choose_engine(
    kind: str, rows: int, outputs: int, inputs: int, engines: tuple[str, ...] = ENGINES
) -> str:
    """Return the engine of a product, see :class:`Shape`; measured if it is the first of its class.

    Args:
        kind, rows, outputs, inputs: see :class:`Shape`.
        engines: those that the caller can use; must contain ``tiles``.
    Raises: ValueError for an unknown engine in the environment.
    """
    forced = forced_engine()
    if forced is not None:
        return forced if forced in engines else "tiles"
    return _chosen(shape_class(kind, rows, outputs, inputs), engines)


def native_engines(rows: int, outputs: int, inputs: int) -> structs.Engines:
    """Return the engines of the three products of a linear layer, for kernels in C++."""
    return structs.Engines(*_native_numbers(forced_engine(), rows, outputs, inputs))


# Looked up at each call of a branch: on small images that would be a part of its time.
@functools.lru_cache(maxsize=4096)
def _native_numbers(_forced: str | None, rows: int, outputs: int, inputs: int) -> tuple[int, ...]:
    engines = tuple(NATIVE_ENGINES)
    return tuple(
        NATIVE_ENGINES[choose_engine(kind, rows, outputs, inputs, engines)]
        for kind in ("forward", "input", "weight")
    )


@functools.cache
def _chosen(shape: Shape, engines: tuple[str, ...]) -> str:
    choices = _choices(engines)
    return choices.get(shape) if choices is not None else "tiles"


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """Return the matrix product of ``a``, (m, k), and ``b``, (k, n).

    Args:
        a, b: float32 on a CPU, each row-major or transposed.
        out: (m, n), where to write it; contiguous.
        add: add to ``out`` instead.
    """
    kind = "weight" if _is_turned(a) else "forward" if _is_turned(b) else "input"
    (m, k), n = a.shape, b.shape[1]
    if not (m and n and k):
        return _by_mkl(a, b, out, add)
    sides = {"forward": (m, n, k), "input": (m, k, n), "weight": (k, m, n)}[kind]
    return RUN[choose_engine(kind, *sides)](a, b, out, add)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weight^T + bias`` for x (P, C), weight (D, C) and bias (D,), float32 on a CPU."""
    if bias is None or not len(x):
        return multiply(x, weight.T) if bias is None else F.linear(x, weight, bias)
    engine = choose_engine("forward", len(x), *weight.shape)
    if engine == "tiles":
        return multiply(x, weight.T).add_(bias)
    return (_by_pointwise if engine == "onednn" else F.linear)(x, weight, bias)


def _is_turned(x: Tensor) -> bool:
    return x.stride(1) != 1 and x.shape[1] > 1


def _readable(x: Tensor) -> Tensor:
    """Return a matrix that is row-major or transposed, copied if it is neither."""
    return x if x.stride(0) == 1 or x.stride(1) == 1 else x.contiguous()


def _by_tiles(a: Tensor, b: Tensor, out: Tensor | None, add: bool) -> Tensor:
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    return cast(Library, library()).product_(_readable(a), _readable(b), out, add=add)


def _by_mkl(a: Tensor, b: Tensor, out: Tensor | None, add: bool) -> Tensor:
    if out is None:
        return torch.mm(a, b)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def _by_onednn(a: Tensor, b: Tensor, out: Tensor | None, add: bool) -> Tensor:
    result = _by_pointwise(a, b.T, None)
    if out is None:
        return result
    return out.add_(result) if add else out.copy_(result)


def _by_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


RUN: dict[str, Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]] = {
    "tiles": _by_tiles,
    "onednn": _by_onednn,
    "mkl": _by_mkl,
}


# Measuring


def measure(shape: Shape, engines: tuple[str, ...] = ENGINES) -> dict[str, float]:
    """Return the seconds of a product by each engine: the least of interleaved repeats."""
    a, b = shape.operands()
    out = torch.empty(a.shape[0], b.shape[1])
    seconds: dict[str, list[float]] = {engine: [] for engine in engines if _is_available(engine)}
    # The time of one thread knows no other programs on a busy machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(REPEATS + 1):
        for engine, times in seconds.items():
            start = clock()
            RUN[engine](a, b, out, False)
            times.append(clock() - start)
    return {engine: min(times[1:]) for engine, times in seconds.items()}


def _is_available(engine: str) -> bool:
    return engine != "onednn" or torch.backends.mkldnn.is_available()


class _Choices:
    """Choices of this machine, in a file that its processes share."""

    def __init__(self, file: Path, engines: tuple[str, ...]) -> None:
        self.file, self.engines = file, engines

    def get(self, shape: Shape) -> str:
        """Return the choice for a class of shapes; measure and keep it if there is none."""
        key = " ".join(str(part) for part in shape)
        if (choice := self._read().get(key)) in self.engines:
            return choice
        try:
            with self._locked():
                # Another process may have measured meanwhile.
                if (choice := self._read().get(key)) in self.engines:
                    return choice
                choice = self._measure(shape)
                with replacing(self.file, durable=False) as temporary:
                    temporary.write_text(json.dumps(self._read() | {key: choice}, indent=1))
        except OSError as error:
            logger.info("Products of %s are not measured: %s.", shape, error)
            return "tiles"
        return choice

    def _measure(self, shape: Shape) -> str:
        seconds = measure(shape, self.engines)
        best = min(seconds, key=lambda engine: seconds[engine])
        choice = best if seconds[best] * MARGIN < seconds["tiles"] else "tiles"
        times = ", ".join(f"{engine} {1e3 * s:.2f} ms" for engine, s in seconds.items())
        logger.info("Products like %s are computed by %s (%s).", tuple(shape), choice, times)
        return choice

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _choices(engines: tuple[str, ...]) -> _Choices | None:
    """Return the choices of this machine; None where there is no folder to keep them."""
    try:
        folder = library_cache.cache_folder()
    except library_cache.CacheError:
        return None
    if not folder.is_dir():
        return None
    parts = [capabilities.fingerprint(), torch.__version__, cast(Library, library()).key, *engines]
    name = hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()[:20]
    return _Choices(folder / f"products-{name}.json", engines)
