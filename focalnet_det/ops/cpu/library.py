"""Call the kernels in C++ for CPUs, built on first use where there is a compiler; never needed.

``csrc`` is compiled in a few seconds for the CPU at hand, see :mod:`.library_build`, and kept in a
cache folder, see :mod:`.library_cache`. Its name there holds a hash of the source, the compiler
and the CPU, so that machines can share the folder. Nothing of PyTorch is compiled against: tensors
go as pointers.
"""

import ctypes
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..focal_block.weights import Affine
from . import capabilities, structs
from . import library_build as native_build
from . import library_cache as native_cache
from .library_build import BuildError as BuildError

DTYPES = (torch.float32, torch.bfloat16)
LARGEST_KERNEL = 15
MOST_LEVELS = structs.MOST_LEVELS

logger = logging.getLogger(__name__)


@functools.cache
def library() -> "Library | BuildError":
    """Return the kernels, built if need be, or why there are none; decided once in a process.

    Without them PyTorch computes the same: a warning says what is wrong and what to do.

    Raises: ValueError if ``FOCALNET_DET_CPU`` names no set of instructions.
    """
    capabilities.chosen_level()
    try:
        return Library(*_load())
    except BuildError as error:
        problem = error
    except Exception as error:
        # Nothing that is wrong with them may stop a run.
        problem = BuildError(f"{type(error).__name__}: {error}")
    logger.warning(
        "Blocks run without native kernels, more slowly: %s. %s; FOCALNET_DET_OPS=torch is the "
        "same without this warning.",
        problem,
        problem.advice,
    )
    return problem


class Library:
    """Functions of ``csrc`` on tensors, with ``torch.get_num_threads()`` threads.

    Attributes:
        key: of the sources, the compiler and the CPU.
        parallel: several threads can run.
        has_tiles: blocks in inference can have products in bfloat16.
    """

    def __init__(self, functions: ctypes.CDLL, key: str) -> None:
        self._functions, self.key = functions, key
        entry = _openmp()
        self.parallel = bool(entry)
        functions.focalnet_has_tiles.restype = ctypes.c_long
        self.has_tiles = bool(functions.focalnet_has_tiles())
        functions.focalnet_set_threads(entry)
        functions.focalnet_set_gemm(_sgemm())

    def depthwise(self, x: Tensor, kernel: Tensor, *, flip: bool = False) -> Tensor:
        """Convolve each channel, see :func:`...focal_block.pytorch.depthwise.depthwise`.

        Args:
            x: (N, H, W, C), of one of :data:`DTYPES`.
            kernel: (C, 1, k, k), of the same dtype, odd k.
            flip: turn the taps around: the gradient with respect to the input.
        Returns: (N, H, W, C), contiguous.
        """
        x, kernel = x.contiguous(), kernel.contiguous()
        out = torch.empty_like(x)
        self._call("depthwise", x, **_map(x), size=kernel.shape[-1], flip=flip,
                   x=x, kernel=kernel, before=out)  # fmt: skip
        return out

    def level(
        self, x: Tensor, kernel: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return :meth:`depthwise`, and the GELU of that times ``valid``, (N, H, W, 1)."""
        x, kernel, valid = x.contiguous(), kernel.contiguous(), _single(valid)
        before, after = torch.empty_like(x), torch.empty_like(x)
        self._call("depthwise", x, **_map(x), size=kernel.shape[-1],
                   x=x, kernel=kernel, valid=valid, before=before, after=after)  # fmt: skip
        return before, after

    def depthwise_weight_gradient(self, x: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Return the gradient by ``kernel`` of :meth:`depthwise`; k at most LARGEST_KERNEL."""
        x, gradient = x.contiguous(), gradient.contiguous()
        out = x.new_empty(x.shape[-1], 1, size, size)
        self._call("depthwise_weight", x, **_map(x), size=size, x=x, gradient=gradient, out=out)
        return out

    def gelu(self, x: Tensor, valid: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the GELU of (..., C), plus ``bias``, (C,), times ``valid``, (..., 1)."""
        x, valid = x.contiguous(), _single(valid)
        out = torch.empty_like(x)
        self._call("gelu", x, **_rows(x), x=x, bias=bias, valid=valid, out=out)
        return out

    def gelu_pair_(self, before: Tensor, bias: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the GELU of ``before``, (..., C), plus ``bias``, (C,), and a gradient's sums.

        ``gradient``, contiguous, is multiplied by the slope there.

        Returns: the former; sums of the latter over all but C, (C,), float32.
        """
        before, after = before.contiguous(), torch.empty_like(gradient)
        grad_bias = before.new_empty(before.shape[-1], dtype=torch.float32)
        self._call("gelu_pair", before, **_rows(before), before=before, bias=bias,
                   gradient=gradient, after=after, grad_bias=grad_bias)  # fmt: skip
        return after, grad_bias

    def residual_(self, branch: Tensor, x: Tensor, bias: Tensor, factors: Tensor | None) -> None:
        """Make of ``branch``, (N, P, C), ``x`` plus ``factors`` times the sum of it and ``bias``.

        Args:
            branch, x: contiguous.
            bias: (C,).
            factors: (N, 1, 1) or (1, P, 1); None for 1.
        """
        rows, factors = branch.shape[:-1].numel(), _single(factors)
        repeat = 1 if factors is None else rows // max(1, factors.numel())
        self._call("residual", x, **_rows(branch), repeat=repeat,
                   branch=branch, x=x, bias=bias, factors=factors)  # fmt: skip

    def gate(self, query: Tensor, query_bias: Tensor, modulator: Tensor, h_bias: Tensor) -> Tensor:
        """Return the product of ``query`` and ``modulator``, (..., C), each plus its bias, (C,)."""
        query, modulator = query.contiguous(), modulator.contiguous()
        out = torch.empty_like(query)
        self._call("gate", query, **_rows(query), query=query, query_bias=query_bias,
                   modulator=modulator, bias=h_bias, out=out)  # fmt: skip
        return out

    def gate_backward_(
        self,
        gradient: Tensor,
        query: Tensor,
        query_bias: Tensor,
        modulator: Tensor,
        h_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return gradients of :meth:`gate` by ``query`` and ``modulator``, and their float32 sums.

        ``gradient``, by the product, contiguous, becomes that by ``modulator``.
        """
        query, modulator = query.contiguous(), modulator.contiguous()
        grad_query = torch.empty_like(gradient)
        sums = query.new_empty(2, query.shape[-1], dtype=torch.float32)
        self._call("gate_backward", query, **_rows(query), gradient=gradient, query=query,
                   query_bias=query_bias, modulator=modulator, bias=h_bias, grad_query=grad_query,
                   sums=sums)  # fmt: skip
        return grad_query, gradient, sums[0], sums[1]

    def gated_sum(self, contexts: list[Tensor], gates: Tensor, shared: Tensor) -> Tensor:
        """Sum contexts, (N, P, C) and last (N, 1, C), times ``gates``, (N, P, L + 1)."""
        gates, out = gates.contiguous(), shared.new_empty(*gates.shape[:2], shared.shape[-1])
        self._gated_sum(contexts, gates, shared, out, backward=False)
        return out

    def gates_gradient(self, grad_sum: Tensor, contexts: list[Tensor], shared: Tensor) -> Tensor:
        """Return the gradient by ``gates`` of :meth:`gated_sum`, from that by its result."""
        grad_sum = grad_sum.contiguous()
        out = grad_sum.new_empty(*grad_sum.shape[:2], len(contexts) + 1)
        self._gated_sum(contexts, out, shared, grad_sum, backward=True)
        return out

    def _gated_sum(
        self, contexts: list[Tensor], gates: Tensor, shared: Tensor, total: Tensor, backward: bool
    ) -> None:
        contexts, shared = [context.contiguous() for context in contexts], shared.contiguous()
        pointers = (ctypes.c_void_p * len(contexts))(*(t.data_ptr() for t in contexts))
        self._call("gated_sum", shared, **_rows(total), levels=len(contexts),
                   repeat=total.shape[1], backward=backward, contexts=ctypes.addressof(pointers),
                   shared=shared, gates=gates, total=total)  # fmt: skip

    def level_backward(
        self,
        grad_sum: Tensor,
        gates: Tensor | None,
        grad_after: Tensor | None,
        before: Tensor,
        valid: Tensor | None,
        *,
        out: Tensor,
    ) -> Tensor:
        """Multiply the slope of GELU at ``before`` by ``valid * (grad_sum * gates + grad_after)``.

        Args:
            grad_sum, before: (..., C), contiguous.
            gates: (...), any one stride.
            grad_after: (N, H, W, C), contiguous or expanded from (N, 1, 1, C).
            valid: (..., 1).
            out: (..., C), contiguous, the result; may be ``grad_sum``.
        """
        rows, repeat, valid = before.shape[:-1].numel(), 1, _single(valid)
        if grad_after is not None and grad_after.stride()[1:3] == (0, 0):
            grad_after, repeat = grad_after[:, 0, 0], rows // len(grad_after)
        grad_after = None if grad_after is None else grad_after.contiguous()
        pitch = 0 if gates is None else gates.stride(-1)
        self._call("level_backward", before, **_rows(before), pitch=pitch, repeat=repeat,
                   grad_sum=grad_sum, gates=gates, grad_after=grad_after, before=before,
                   valid=valid, out=out)  # fmt: skip
        return out

    def norm(self, x: Tensor, norm: Affine) -> tuple[Tensor, Tensor]:
        """Apply layer norm to (..., C); weight and bias are of the dtype of ``x``.

        Returns: the result; mean and inverse deviation of each row, (..., 2), float32.
        """
        x = x.contiguous()
        out, statistics = torch.empty_like(x), x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
        self._call("norm", x, **_rows(x), eps=norm.eps, x=x, weight=norm.weight, bias=norm.bias,
                   out=out, statistics=statistics)  # fmt: skip
        return out, statistics

    def norm_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        statistics: Tensor,
        residual: Tensor | None = None,
        *,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write the gradient of :meth:`norm` by ``x`` to ``out``.

        Args:
            gradient, x: (..., C).
            weight: of the norm.
            statistics: of :meth:`norm`.
            residual: (..., C), contiguous, is added to the gradient by ``x``.
            out: (..., C), contiguous; may be ``gradient``.
        Returns: gradients by weight and bias, (C,), float32.
        """
        grad_affine = [x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2)]
        gradient, x = gradient.contiguous(), x.contiguous()
        self._call("norm_backward", x, **_rows(x), gradient=gradient, x=x, weight=weight,
                   statistics=statistics, residual=residual, grad_x=out,
                   grad_weight=grad_affine[0], grad_bias=grad_affine[1])  # fmt: skip
        return grad_affine[0], grad_affine[1]

    def product_(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """Write the matrix product of ``a``, (m, k), and ``b``, (k, n), to ``out``.

        Args:
            a, b: float32, each row-major or transposed, with any pitch.
            out: (m, n), float32, contiguous.
            add: add to what is there.
        Returns: ``out``.
        """
        (m, k), n = a.shape, b.shape[1]
        a_turned, b_turned = a.stride(1) != 1, b.stride(1) != 1
        self._call("product", out, a=a, b=b, out=out, m=m, n=n, k=k, add=add,
                   a_width=a.stride(1 if a_turned else 0), a_turned=a_turned,
                   b_width=b.stride(1 if b_turned else 0), b_turned=b_turned)  # fmt: skip
        return out

    def run(self, name: str, call: ctypes.Structure) -> None:
        """Call a function of ``csrc`` with a struct of :mod:`.structs`."""
        getattr(self._functions, f"focalnet_{name}")(ctypes.byref(call))

    def _call(self, name: str, like: Tensor, **fields: Any) -> None:
        """Call a function on tensors of the dtype of ``like``; tensors become addresses."""
        kind = structs.CALLS[name]
        values = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
        call = kind(threads=torch.get_num_threads(), **values)
        if name != "product":
            call.sixteen = like.dtype == torch.bfloat16
        self.run(name, call)


def _map(x: Tensor) -> dict[str, int]:
    n, h, w, c = x.shape
    return {"n": n, "h": h, "w": w, "c": c}


def _rows(x: Tensor) -> dict[str, int]:
    return {"rows": x.shape[:-1].numel(), "c": x.shape[-1]}


def _single(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.float().contiguous()


def _openmp() -> ctypes.c_void_p:
    """Return the entry point of the OpenMP library that PyTorch has loaded; null without one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        return ctypes.c_void_p()


def _sgemm() -> ctypes.c_void_p | None:
    """Return ``sgemm`` of the library that PyTorch brings; None where it hides it."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        return ctypes.cast(ctypes.CDLL(str(folder / "libtorch_cpu.so")).sgemm_, ctypes.c_void_p)
    except (AttributeError, OSError):
        return None


# Building


def _load() -> tuple[ctypes.CDLL, str]:
    """Return the library and its key.

    Raises: BuildError.
    """
    compiler = native_build.find_compiler()
    key = native_build.build_key(compiler)

    def build(file: Path) -> None:
        start = time.perf_counter()
        native_build.compile_library(file, compiler)
        seconds = time.perf_counter() - start
        logger.info("Built the native kernels with %s in %.1f s.", compiler[0], seconds)

    notes: list[str] = []
    try:
        functions = native_cache.load(key, build, notes)
        ending = "They were built again."
    except native_cache.CacheError as problem:
        notes.append(str(problem))
        functions = _load_alone(build, notes)
        ending = (
            "They were built for this process alone, as they will be each time: let "
            f"{native_cache.VARIABLE} name a folder of yours."
        )
    if notes:
        logger.warning("Native kernels: %s. %s", BuildError("; ".join(notes)), ending)
    return functions, key


def _load_alone(build: Callable[[Path], None], notes: list[str]) -> ctypes.CDLL:
    """Build a library for this process alone.

    Raises: BuildError, which also says what came before.
    """
    try:
        return native_cache.load_alone(build)
    except (native_cache.CacheError, BuildError) as error:
        advice = getattr(error, "advice", f"Let {native_cache.VARIABLE} name a folder of yours")
        raise BuildError("; ".join([*notes, str(error)]), advice) from None
