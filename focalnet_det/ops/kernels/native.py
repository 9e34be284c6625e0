"""Kernels in C++ for CPUs, built on first use where there is a compiler; never needed.

``native.cpp`` is compiled in a few seconds for the CPU at hand, see :mod:`.native_build`, and kept
in a cache folder, see :mod:`.native_cache`. Its name there holds a hash of the source, the compiler
and the CPU, so that machines can share the folder. Nothing of PyTorch is compiled against: tensors
go as pointers.
"""

import ctypes
import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import capabilities, native_build, native_cache
from .native_build import BuildError as BuildError
from .parameters import Affine, BlockWeights

DTYPES = (torch.float32, torch.bfloat16)
LARGEST_KERNEL = 15
MOST_LEVELS = 8

logger = logging.getLogger(__name__)


@functools.cache
def library() -> "Library | BuildError":
    """Return the kernels, built if need be, or why there are none; decided once in a process.

    Without them PyTorch computes the same: a warning says what is wrong and what to do.

    Raises: ValueError if ``FOCALNET_DET_CPU`` names no set of instructions.
    """
    capabilities.chosen_level()
    try:
        return Library(_load())
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
    """The functions of ``native.cpp`` on tensors. Threads: those of ``torch.get_num_threads()``."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        entry = _openmp()
        self.parallel = bool(entry)
        functions.focalnet_has_tiles.restype = ctypes.c_long
        # Whether :meth:`block` has products in bfloat16: with the tile registers of Intel's AMX.
        self.has_tiles = bool(functions.focalnet_has_tiles())
        functions.focalnet_set_threads(entry)
        sgemm = _sgemm()
        # Whether :meth:`branch` can be called.
        self.has_branches = sgemm is not None
        functions.focalnet_set_gemm(sgemm)

    def depthwise(self, x: Tensor, kernel: Tensor, *, flip: bool = False) -> Tensor:
        """Cross-correlation, see :func:`focalnet_det.ops.kernels.depthwise.depthwise`.

        Args:
            x: (N, H, W, C), of one of :data:`DTYPES`.
            kernel: (C, 1, k, k), of the same type, odd k.
            flip: turn the taps around: the gradient by the input.
        Returns: (N, H, W, C), contiguous.
        """
        x, kernel = x.contiguous(), kernel.contiguous()
        out = torch.empty_like(x)
        tensors = x, kernel, None, out, None
        self._call("depthwise", tensors, *x.shape, kernel.shape[-1], flip)
        return out

    def level(
        self, x: Tensor, kernel: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`depthwise`, and the GELU of that times ``valid``, (N, H, W, 1)."""
        x, kernel = x.contiguous(), kernel.contiguous()
        before, after = torch.empty_like(x), torch.empty_like(x)
        tensors = x, kernel, _single(valid), before, after
        self._call("depthwise", tensors, *x.shape, kernel.shape[-1], False)
        return before, after

    def depthwise_weight_gradient(self, x: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Gradient by ``kernel`` for k up to :data:`LARGEST_KERNEL`; see :meth:`depthwise`."""
        x, gradient = x.contiguous(), gradient.contiguous()
        out = x.new_empty(x.shape[-1], 1, size, size)
        self._call("depthwise_weight", (x, gradient, out), *x.shape, size)
        return out

    def gelu(self, x: Tensor, valid: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """GELU of (..., C), plus ``bias``, (C,), times ``valid``, (..., 1)."""
        x = x.contiguous()
        out = torch.empty_like(x)
        tensors = x, bias, _single(valid), out
        self._call("gelu", tensors, x.shape[:-1].numel(), x.shape[-1])
        return out

    def gelu_pair_(self, before: Tensor, bias: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """GELU of ``before``, (..., C), plus ``bias``, (C,).

        ``gradient``, contiguous, is multiplied by the slope there.

        Returns: the former; sums of the latter over all but C, (C,), float32.
        """
        before, after = before.contiguous(), torch.empty_like(gradient)
        grad_bias = before.new_empty(before.shape[-1], dtype=torch.float32)
        tensors = before, bias, gradient, after, grad_bias
        self._call("gelu_pair", tensors, before.shape[:-1].numel(), before.shape[-1])
        return after, grad_bias

    def residual_(self, branch: Tensor, x: Tensor, bias: Tensor, factors: Tensor | None) -> None:
        """``branch``, (N, P, C), becomes ``x`` plus ``factors`` times the sum of it and ``bias``.

        Args:
            branch, x: contiguous.
            bias: (C,).
            factors: (N, 1, 1) or (1, P, 1); None for 1.
        """
        rows, c = branch.shape[:-1].numel(), branch.shape[-1]
        repeat = 1 if factors is None else rows // max(1, factors.numel())
        self._call("residual", (branch, x, bias, _single(factors)), rows, c, repeat)

    def gate(self, query: Tensor, query_bias: Tensor, modulator: Tensor, h_bias: Tensor) -> Tensor:
        """Product of ``query``, (..., C), and ``modulator``, each plus its bias, (C,)."""
        query, modulator = query.contiguous(), modulator.contiguous()
        out = torch.empty_like(query)
        tensors = query, query_bias, modulator, h_bias, out
        self._call("gate", tensors, query.shape[:-1].numel(), query.shape[-1])
        return out

    def gate_backward_(
        self,
        gradient: Tensor,
        query: Tensor,
        query_bias: Tensor,
        modulator: Tensor,
        h_bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of :meth:`gate` by ``query`` and ``modulator``, and their sums, float32.

        ``gradient``, by the product, contiguous, becomes that by ``modulator``.
        """
        query, modulator = query.contiguous(), modulator.contiguous()
        grad_query, c = torch.empty_like(gradient), query.shape[-1]
        sums = query.new_empty(2, c, dtype=torch.float32)
        tensors = gradient, query, query_bias, modulator, h_bias, grad_query, sums
        self._call("gate_backward", tensors, query.shape[:-1].numel(), c)
        return grad_query, gradient, sums[0], sums[1]

    def gated_sum(self, contexts: list[Tensor], gates: Tensor, shared: Tensor) -> Tensor:
        """Contexts, (N, P, C) and last (N, 1, C), times ``gates``, (N, P, L + 1), and summed."""
        gates, out = gates.contiguous(), shared.new_empty(*gates.shape[:2], shared.shape[-1])
        self._gated_sum(contexts, gates, shared, out, backward=False)
        return out

    def gates_gradient(self, grad_sum: Tensor, contexts: list[Tensor], shared: Tensor) -> Tensor:
        """Gradient by ``gates`` of :meth:`gated_sum`, from that by its result."""
        grad_sum, out = (
            grad_sum.contiguous(),
            grad_sum.new_empty(*grad_sum.shape[:2], len(contexts) + 1),
        )
        self._gated_sum(contexts, out, shared, grad_sum, backward=True)
        return out

    def _gated_sum(
        self, contexts: list[Tensor], gates: Tensor, shared: Tensor, total: Tensor, backward: bool
    ) -> None:
        contexts, shared = [context.contiguous() for context in contexts], shared.contiguous()
        pointers = (ctypes.c_void_p * len(contexts))(*(t.data_ptr() for t in contexts))
        n, rows, c = total.shape
        numbers = n * rows, c, len(contexts), rows, backward
        self._call("gated_sum", (shared, gates, total), *numbers, first=(pointers,))

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
        """Derivative of GELU at ``before`` times ``valid * (grad_sum * gates + grad_after)``.

        Args:
            grad_sum, before: (..., C), contiguous.
            gates: (...), any one stride.
            grad_after: (N, H, W, C), contiguous or expanded from (N, 1, 1, C).
            valid: (..., 1).
            out: (..., C), contiguous, the result; may be ``grad_sum``.
        """
        rows, repeat = before.shape[:-1].numel(), 1
        if grad_after is not None and grad_after.stride()[1:3] == (0, 0):
            grad_after, repeat = grad_after[:, 0, 0], rows // len(grad_after)
        grad_after = None if grad_after is None else grad_after.contiguous()
        pitch = 0 if gates is None else gates.stride(-1)
        tensors = grad_sum, gates, grad_after, before, _single(valid), out
        self._call("level_backward", tensors, rows, before.shape[-1], pitch, repeat)
        return out

    def norm(self, x: Tensor, norm: Affine) -> tuple[Tensor, Tensor]:
        """Layer norm of (..., C); weight and bias are of the type of ``x``.

        Returns: it; mean and inverse deviation of each row, (..., 2), float32.
        """
        x = x.contiguous()
        out, statistics = torch.empty_like(x), x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
        tensors = x, norm.weight, norm.bias, out, statistics
        eps = ctypes.byref(ctypes.c_float(norm.eps))
        self._call("norm", tensors, x.shape[:-1].numel(), x.shape[-1], last=(eps,))
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
        """Gradients of :meth:`norm`: by ``x``, which is written to ``out``, by weight and bias.

        Args:
            gradient, x: (..., C).
            weight: of the norm.
            statistics: of :meth:`norm`.
            residual: (..., C), contiguous, is added to the gradient by ``x``.
            out: (..., C), contiguous; may be ``gradient``.
        Returns: those by weight and bias, (C,), float32.
        """
        grad_affine = [x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2)]
        gradient, x = gradient.contiguous(), x.contiguous()
        tensors = gradient, x, weight, statistics, residual, out, *grad_affine
        self._call("norm_backward", tensors, x.shape[:-1].numel(), x.shape[-1])
        return grad_affine[0], grad_affine[1]

    def block(
        self, x: Tensor, weights: BlockWeights, valid: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """A whole block in inference; see :func:`focalnet_det.ops.kernels.inference.block`.

        Args:
            x: (N, H, W, C), of one of :data:`DTYPES`.
            weights: of the block; at most :data:`MOST_LEVELS` levels.
            valid: (N, H, W, 1).
            dtype: of the products, bfloat16 only with ``has_tiles``.
        Returns: (N, H, W, C), contiguous.
        """
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        struct = _Block(x=x.data_ptr(), out=out.data_ptr(), threads=torch.get_num_threads())
        alive: list[Tensor] = []

        def pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
            if tensor is None:
                return None
            alive.append(tensor.detach().to(dtype).contiguous())
            return alive[-1].data_ptr()

        modulation, mlp = weights.modulation, weights.mlp
        layers: dict[str, Affine | None] = {
            "norm1": weights.norm1, "f": modulation.f, "h": modulation.h,
            "proj": modulation.proj, "ln": modulation.ln, "norm2": weights.norm2,
            "fc1": mlp.fc1, "fc2": mlp.fc2,
        }  # fmt: skip
        for name, layer in layers.items():
            if layer is not None:
                kind = dtype if layer.weight.ndim == 2 else torch.float32
                setattr(struct, f"{name}_weight", pointer(layer.weight, kind))
                setattr(struct, f"{name}_bias", pointer(layer.bias))
                if hasattr(struct, f"{name}_eps"):
                    setattr(struct, f"{name}_eps", layer.eps)
        struct.gamma1, struct.gamma2 = pointer(weights.gamma_1), pointer(weights.gamma_2)
        struct.valid = pointer(valid)
        struct.n, struct.h, struct.w, struct.c = x.shape
        struct.sixteen_maps = x.dtype == torch.bfloat16
        struct.sixteen_products = dtype == torch.bfloat16
        struct.hidden, struct.post_norm = len(mlp.fc1.weight), weights.post_norm
        struct.levels, struct.divisor = len(modulation.kernels), modulation.divisor
        for level, kernel in enumerate(modulation.kernels):
            struct.kernels[level], struct.sizes[level] = pointer(kernel), kernel.shape[-1]
        self._functions.focalnet_block(ctypes.byref(struct))
        return out

    def branch(
        self,
        name: str,
        tensors: Sequence[Tensor | None],
        numbers: tuple[Sequence[int], Sequence[int]],
        reals: Sequence[float],
        backward: bool,
    ) -> None:
        """A branch of a block in training or its gradients, see ``native_branches.h``.

        Args:
            name: ``modulation`` or ``mlp``.
            tensors: contiguous, float32, in the order of ``run_branch`` there.
            numbers: the map's shape, (N, H, W, C), and what the branch adds.
            reals: ``eps`` of the norm, and what the branch adds.
            backward: which of the two.
        """
        shape, more = numbers
        integers = *shape, torch.get_num_threads(), *more
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        getattr(self._functions, f"focalnet_{name}")(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_long * len(integers))(*integers),
            (ctypes.c_float * len(reals))(*reals),
            ctypes.c_long(backward),
        )

    def roi_align(self, maps: list[Tensor], out: Tensor, pooling: "Pooling") -> None:
        """Writes RoIAlign of boxes to ``out``; see :func:`focalnet_det.ops.roi_align.roi_align`.

        Args:
            maps: at most :data:`MOST_LEVELS`, (N, H, W, C), contiguous, float32.
            out: (R, size, size, C), contiguous, float32.
            pooling: of R boxes.
        """
        self._functions.focalnet_roi_align(ctypes.byref(_pyramid(maps, out, pooling)))

    def roi_align_backward_(self, maps: list[Tensor], gradient: Tensor, pooling: "Pooling") -> None:
        """Adds the gradients by the maps to ``maps``, from that by :meth:`roi_align`'s ``out``."""
        self._functions.focalnet_roi_align_backward(ctypes.byref(_pyramid(maps, gradient, pooling)))

    def _call(
        self,
        name: str,
        tensors: tuple[Tensor | None, ...],
        *numbers: int,
        first: tuple[Any, ...] = (),
        last: tuple[Any, ...] = (),
    ) -> None:
        """All functions take pointers, then numbers, then the type and the threads.

        ``first`` and ``last`` are pointers that belong to no tensor.
        """
        pointers = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors]
        sixteen = tensors[0] is not None and tensors[0].dtype == torch.bfloat16
        function = getattr(self._functions, f"focalnet_{name}")
        numbers = (*numbers, sixteen, torch.get_num_threads())
        function(*first, *pointers, *last, *(ctypes.c_long(number) for number in numbers))


class _Block(ctypes.Structure):
    """``struct Block`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "out", "valid", "f_weight", "h_weight", "proj_weight", "fc1_weight", "fc2_weight",
            "norm1_weight", "norm1_bias", "f_bias", "h_bias", "proj_bias", "ln_weight", "ln_bias",
            "gamma1", "norm2_weight", "norm2_bias", "fc1_bias", "fc2_bias", "gamma2",
        )),
        ("kernels", ctypes.c_void_p * MOST_LEVELS),
        ("sizes", ctypes.c_long * MOST_LEVELS),
        *((name, ctypes.c_long) for name in (
            "sixteen_maps", "sixteen_products",
            "n", "h", "w", "c", "hidden", "levels", "post_norm", "threads",
        )),
        *((name, ctypes.c_float) for name in ("norm1_eps", "ln_eps", "norm2_eps", "divisor")),
    )  # fmt: skip


class Pooling(NamedTuple):
    """How boxes are pooled.

    Attributes:
        boxes: (R, 5), image and corners x0, y0, x1, y1, contiguous, float32.
        levels: (R,), of the maps, contiguous, int64.
        size: of the result.
        scales: of the maps, over that of the boxes.
        sampling_ratio: points along each side of a bin, 0 for one per pixel.
        aligned: whether centres of pixels lie at halves.
    """

    boxes: Tensor
    levels: Tensor
    size: int
    scales: Sequence[float]
    sampling_ratio: int
    aligned: bool


class _Pyramid(ctypes.Structure):
    """``struct Pyramid`` of the source."""

    _fields_ = (
        ("maps", ctypes.c_void_p * MOST_LEVELS),
        ("scales", ctypes.c_float * MOST_LEVELS),
        ("heights", ctypes.c_long * MOST_LEVELS),
        ("widths", ctypes.c_long * MOST_LEVELS),
        *((name, ctypes.c_void_p) for name in ("boxes", "levels", "out")),
        *((name, ctypes.c_long) for name in (
            "count", "c", "size", "ratio", "aligned", "threads",
        )),
    )  # fmt: skip


def _pyramid(maps: list[Tensor], out: Tensor, pooling: Pooling) -> _Pyramid:
    struct = _Pyramid(
        boxes=pooling.boxes.data_ptr(), levels=pooling.levels.data_ptr(), out=out.data_ptr(),
        count=len(pooling.boxes), c=out.shape[-1], size=pooling.size,
        ratio=pooling.sampling_ratio, aligned=pooling.aligned, threads=torch.get_num_threads(),
    )  # fmt: skip
    for level, x in enumerate(maps):
        struct.maps[level], struct.scales[level] = x.data_ptr(), pooling.scales[level]
        struct.heights[level], struct.widths[level] = x.shape[1:3]
    return struct


def _single(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.float().contiguous()


def _openmp() -> ctypes.c_void_p:
    """Entry point of the OpenMP library that PyTorch has loaded; null, one thread, without one."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        return ctypes.c_void_p()


def _sgemm() -> ctypes.c_void_p | None:
    """``sgemm`` of the library of matrix products that PyTorch brings; None where it hides it."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        return ctypes.cast(ctypes.CDLL(str(folder / "libtorch_cpu.so")).sgemm_, ctypes.c_void_p)
    except (AttributeError, OSError):
        return None


# Building


def _load() -> ctypes.CDLL:
    """Raises: BuildError."""
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
    return functions


def _load_alone(build: Callable[[Path], None], notes: list[str]) -> ctypes.CDLL:
    """Raises: BuildError, which also says what came before."""
    try:
        return native_cache.load_alone(build)
    except (native_cache.CacheError, BuildError) as error:
        advice = getattr(error, "advice", f"Let {native_cache.VARIABLE} name a folder of yours")
        raise BuildError("; ".join([*notes, str(error)]), advice) from None
