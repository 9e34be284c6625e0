"""Launch Triton kernels with little work of the host, and choose by timing."""

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels then run in NumPy on the CPU, one program after the other: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether one kernel was faster than several.
_FASTER: dict[Hashable, bool] = {}

logger = logging.getLogger(__name__)

Grid = tuple[int, ...] | Callable[[dict[str, int]], tuple[int, ...]]


class Kernel:
    """A Triton kernel that remembers what it was compiled to.

    Triton looks at each argument, setting and global variable at every launch, and an autotuned
    kernel at all of that twice: 65 microseconds of the host where this takes 12.
    Code depends on constants, on types, and on whether addresses are multiples of 16 bytes.
    Numbers that are no constants are not specialised: else a training on images of many sizes
    would compile every kernel again whenever one of them becomes 1 or a multiple of 16.

    Attributes:
        reuse: whether to remember anything.
        parameters: names in order, constants last.
    """

    # On AMD code depends on the size of an allocation too.
    reuse = torch.version.hip is None

    def __init__(
        self,
        function: Callable[..., None],
        key: Sequence[str],
        choices: Sequence[tuple[dict[str, int], int]],
    ) -> None:
        parameters = inspect.signature(function).parameters
        self.parameters = tuple(parameters)
        self._constants = tuple(
            name for name, p in parameters.items() if p.annotation is tl.constexpr
        )
        self._function, self._key, self._choices = function, list(key), choices
        self._jitted: Any = None
        self._compiled: dict[Hashable, tuple[Any, list[Any], dict[str, int]]] = {}

    def __call__(self, grid: Grid, *arguments: Any, **constants: Any) -> None:
        """Launch the kernel.

        Args:
            grid: programs, up to three numbers, or a function of the tile sizes that were chosen.
            arguments: those that are no constants, in order; the first is a tensor.
            constants: by name, except those to choose.
        """
        x = arguments[0]
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self(grid, *arguments, **constants)
        key = (
            x.get_device(),
            *constants.values(),
            *[
                (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else a >= 2**31
                for a in arguments
            ],
        )
        found = self._compiled.get(key)
        if found is None:
            compiled = self._of(arguments)[grid](*arguments, **constants)
            if self.reuse and not INTERPRETED:
                best = getattr(self._jitted, "best_config", None)
                sizes = {} if best is None else dict(best.kwargs)
                every = constants | sizes
                self._compiled[key] = compiled, [every[name] for name in self._constants], sizes
            return None
        compiled, values, sizes = found
        programs = grid(sizes) if callable(grid) else grid
        compiled[(*programs, 1, 1)[:3]](*arguments, *values)
        return None

    def _of(self, arguments: tuple[Any, ...]) -> Any:
        """Return what Triton makes of the function."""
        if self._jitted is None:
            numbers = [
                name
                for name, a in zip(self.parameters, arguments, strict=False)
                if not isinstance(a, Tensor)
            ]
            self._jitted = self._jit(numbers)
        return self._jitted

    def _jit(self, numbers: list[str]) -> Any:
        jitted = triton.jit(self._function, do_not_specialize=numbers)
        if not self._choices:
            return jitted
        chosen = self._choices[:1] if INTERPRETED else self._choices
        configurations = [triton.Config(sizes, num_warps=warps) for sizes, warps in chosen]
        # Kept on disk where Triton can do so, from 3.4 on: runs then add up in the same order.
        keeps = "cache_results" in inspect.signature(triton.autotune).parameters
        kept = {"cache_results": True} if keeps else {}
        tuner = triton.autotune(configurations, key=self._key, **kept)(jitted)
        if keeps:
            tuner.check_disk_cache = _KeptChoices(tuner, self._function.__name__)
        return tuner


class _KeptChoices:
    """Times that Triton keeps on disk, without which, or with damaged ones, it measures again.

    Triton reads its file unchecked: a truncated one would end the run, one that was changed would
    choose tiles that nobody offered.
    """

    def __init__(self, tuner: Any, name: str) -> None:
        self._tuner, self._name = tuner, name
        self._read_or_measure = tuner.check_disk_cache

    def __call__(self, key: Hashable, offered: list[Any], measure: Callable[[], None]) -> bool:
        """Choose for ``key``, see ``triton.runtime.Autotuner``; return whether that was kept."""
        measured: list[bool] = []

        def counted() -> None:
            measured.append(False)
            measure()
            measured[-1] = True

        for again in (False, True):
            try:
                kept = bool(self._read_or_measure(key, offered, counted))
                if measured or self._tuner.cache[key].all_kwargs() in [
                    config.all_kwargs() for config in offered
                ]:
                    return kept
                problem: object = "it offers other tiles"
            except Exception as error:
                if measured and not measured[-1]:
                    raise  # by the kernel itself
                problem = error
            if measured:
                logger.warning("Tile sizes of %s cannot be kept: %s.", self._name, problem)
                return False
            if not again:
                logger.warning(
                    "The file of tile sizes of %s is damaged, they are timed again: %s.",
                    self._name,
                    problem,
                )
                self._remove()
        measure()
        return False

    def _remove(self) -> None:
        for file in Path(triton.knobs.cache.dir).glob(f"*/{self._name[:150]}.autotune.json"):
            with contextlib.suppress(OSError):
                file.unlink()


def kernel(
    *choices: tuple[dict[str, int], int], key: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Kernel]:
    """Make a Triton kernel of a function whose constants come last.

    Args:
        choices: tile sizes and warps, of which the fastest is taken for each ``key``; the first
            if kernels are interpreted. None depends on the size of a map: training at many sizes
            would time each of them.
        key: names of constants.
    """
    return lambda function: Kernel(function, key, choices)


def fastest(
    x: Tensor,
    key: tuple[Hashable, ...],
    fused: Callable[[], Tensor],
    separate: Callable[[], Tensor],
) -> Tensor:
    """Return the result of the faster one, timed at the first call for a device and ``key``.

    While a CUDA graph is recorded nothing can be timed: what is not known yet runs separately.
    """
    if INTERPRETED:
        return fused()
    key = x.get_device(), *key
    if key not in _FASTER:
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():
                return separate()
            times = [triton.testing.do_bench(way, warmup=5, rep=20) for way in (fused, separate)]
        _FASTER[key] = times[0] < times[1]
    return fused() if _FASTER[key] else separate()


def ceil_divide(a: int, b: int) -> int:
    """Return ``triton.cdiv``, which itself takes microseconds."""
    return -(-a // b)
