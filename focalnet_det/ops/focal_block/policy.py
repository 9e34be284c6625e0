"""Choose the backend of a block by device, dtype and availability.

``FOCALNET_DET_OPS`` forces a backend: ``reference`` (the readable one), ``torch`` (fused, plain
PyTorch), ``native`` (the same with C++ kernels on CPUs) or ``triton``. Unset, the fastest available
backend runs.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..cpu import capabilities
from ..cpu import library as native
from .weights import BlockWeights

VARIABLE = "FOCALNET_DET_OPS"
# Fastest first.
BACKENDS = ("triton", "native", "torch", "reference")

# Limits of the Triton kernels: kernel size of a focal level, channels, compute capability.
MAX_WINDOW, MAX_CHANNELS, MIN_COMPUTE_CAPABILITY = 15, 4096, (8, 0)
# The kernels use tuples, which earlier versions do not compile.
MIN_TRITON_VERSION = "3.3"
# A block in inference is one C++ call up to so many channels in float32. The call copies all
# weights into another order; those of wide blocks leave the cache and take many pixels to pay.
NARROW_BLOCK, WIDE_BLOCK, MANY_PIXELS = 192, 384, 2048
# Values of a map up to which a branch in training is one C++ call. A thread keeps memory for some
# 13 such maps, which costs no page faults the next time; larger maps go tile by tile.
LARGEST_MAP = 2**21

logger = logging.getLogger(__name__)


def forced_backend() -> str | None:
    """Return the backend that the environment forces, None without one.

    Raises: ValueError for an unknown backend.
    """
    backend = os.environ.get(VARIABLE) or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{VARIABLE}={backend}: must be one of {', '.join(sorted(BACKENDS))}.")
    return backend


def assume_constant(function: Callable) -> Callable:
    """Mark a function as constant for ``torch.compile``.

    Does what ``torch.compiler.assume_constant_result`` does, without its import, which takes as
    long as that of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def force_backend(backend: str | None) -> Iterator[None]:
    """Force a backend within a block; None leaves the choice unchanged."""
    before = os.environ.get(VARIABLE)
    if backend is not None:
        os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if backend is not None:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before


def choose_backend(
    x: Tensor, *, exact: Callable[[], bool] = lambda: True, windows: Sequence[int] = ()
) -> str:
    """Choose the backend of a block, and log the choice once per reason.

    Args:
        x: (N, H, W, C), input of the block.
        exact: tells whether the block consists of the stock layers that the fused functions
            implement; called last, because it is slow.
        windows: kernel sizes of its focal levels.
    Returns: a name from ``BACKENDS``.
    Raises: ValueError for an unknown backend in the environment.
    """
    forced = forced_backend()
    if forced == "reference":
        return forced
    if is_tracing() or (is_exporting() and forced is None):
        # Other programs run such graphs, and they have stock operators only.
        return "reference"
    unsupported = _unsupported_reason(x, exact)
    if unsupported:
        return _report("reference", unsupported)
    reason = f"{VARIABLE} is {forced or 'unset'}"
    if forced == "triton" or (forced is None and x.device.type != "cpu"):
        unsupported = _triton_unsupported(x, windows)
        if not unsupported:
            return _report("triton", reason)
        # On a GPU the torch backend is no faster: its tiles are sized for the caches of CPUs.
        return _report("torch" if x.device.type == "cpu" else "reference", unsupported)
    if forced != "torch":
        unsupported = _native_unsupported(x.device.type, compute_dtype(x)[0])
        if not unsupported:
            return _report("native", reason)
        reason = unsupported
    return _report("torch", reason)


def is_tracing() -> bool:
    """Tell whether ``torch.jit`` is tracing."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Tell whether ``torch.export`` is recording; always False before PyTorch 2.7."""
    query = getattr(torch.compiler, "is_exporting", None)
    return query is not None and bool(query())


def compute_dtype(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype to compute in, and the dtype of results and saved activations.

    The latter follows autocast and ``x``. The former is float32 on CPUs without bfloat16
    arithmetic, where oneDNN emulates it at a tenth of the speed.
    """
    device, stored = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        stored = torch.get_autocast_dtype(device)
    if (
        device == "cpu"
        and stored in (torch.bfloat16, torch.float16)
        and not _has_native_arithmetic(stored)
    ):
        return torch.float32, stored
    return stored, stored


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context that disables autocast on the device of ``x``."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def supports_patch_products(x: Tensor) -> bool:
    """Tell whether non-overlapping convolutions of ``x`` may use :mod:`..cpu.patches`.

    They may on CPUs, unless the reference backend would run or a graph is being recorded.
    """
    if x.device.type != "cpu" or forced_backend() == "reference":
        return False
    if torch.compiler.is_compiling() or is_tracing() or is_exporting():
        return False
    return not _unsupported_reason(x, exact=lambda: True)


def supports_native(
    maps: Sequence[Tensor], dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> bool:
    """Tell whether an operator on these feature maps may run as a C++ kernel.

    It may on CPUs, unless another backend is forced, a graph is being recorded, or the kernels are
    unavailable.

    Args:
        maps: inputs of the operator, any shape.
        dtypes: dtypes that the kernel supports.
    """
    if forced_backend() not in (None, "native") or any(x.dtype not in dtypes for x in maps):
        return False
    if torch.compiler.is_compiling() or is_tracing() or is_exporting():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return not any(_native_unsupported(x.device.type, x.dtype) for x in maps)


def runs_in_one_call(
    library: native.Library, x: Tensor, weights: BlockWeights, dtype: torch.dtype
) -> bool:
    """Tell whether a block in inference on the ``native`` backend is one C++ call.

    Args:
        library: the kernels.
        x: (N, H, W, C), input of the block.
        weights: of the block.
        dtype: of its products.
    """
    if (
        not 0 < len(weights.modulation.kernels) <= native.MOST_LEVELS
        or x.dtype not in native.DTYPES
    ):
        return False
    if dtype == torch.bfloat16:
        return library.has_tiles
    widest = WIDE_BLOCK if x.shape[:-1].numel() >= MANY_PIXELS else NARROW_BLOCK
    return dtype == torch.float32 and x.shape[-1] <= widest


def is_dtype_emulated(x: Tensor) -> bool:
    """Tell whether a stock layer would emulate its dtype on this CPU, which is slow.

    False with the reference backend forced, and while a graph is being recorded.
    """
    if x.device.type != "cpu" or forced_backend() == "reference":
        return False
    if torch.compiler.is_compiling() or is_tracing():
        return False
    dtype, stored = compute_dtype(x)
    return dtype != stored


@assume_constant
def _has_native_arithmetic(dtype: torch.dtype) -> bool:
    return capabilities.cpu().computes(dtype)


@assume_constant
def _native_unsupported(device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        return f"the native kernels run on CPUs, not on {device}"
    if dtype not in native.DTYPES:
        return f"there are no native kernels for {dtype}"
    found = native.library()
    if isinstance(found, native.BuildError):
        return str(found)
    if torch.get_num_threads() > 1 and not found.parallel:
        return "the native kernels found no OpenMP library to run several threads"
    return _check_problem("native", torch.device("cpu"), dtype)


def _check_problem(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return what is wrong with kernels, see :mod:`.self_check`; "" if a backend is forced."""
    if forced_backend() is not None:
        return ""
    from . import self_check  # it runs blocks, whose modules import this one

    return self_check.problem(backend, device, dtype)


def _unsupported_reason(x: Tensor, exact: Callable[[], bool]) -> str:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"only the reference backend supports {x.dtype}"
    if x.numel() == 0:
        return "the batch is empty"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if not exact():
        return "a block has hooks, or layers of a custom class"
    return ""


def _triton_unsupported(x: Tensor, windows: Sequence[int]) -> str:
    if x.device.type not in ("cuda", "cpu"):
        return f"there are no kernels for {x.device.type}"
    unavailable = _triton_unavailable(x.device)
    if unavailable:
        return unavailable
    if not windows or max(windows) > MAX_WINDOW or x.shape[-1] > MAX_CHANNELS:
        return (
            f"the Triton kernels need at least 1 focal level, windows of at most {MAX_WINDOW} and "
            f"at most {MAX_CHANNELS} channels"
        )
    return _triton_problem(x.device, compute_dtype(x)[0])


@assume_constant
def _triton_problem(device: torch.device, dtype: torch.dtype) -> str:
    return _check_problem("triton", device, dtype)


@assume_constant
def _triton_unavailable(device: torch.device) -> str:
    """Return why Triton does not run on a device, "" if it does."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no CPU kernels"
    return _triton_environment(device)


@functools.cache
def _triton_environment(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if TorchVersion(triton.__version__) < MIN_TRITON_VERSION:
        return f"Triton {triton.__version__} is older than 3.3, which PyTorch 2.7 brings"
    if device.type == "cpu":
        return ""
    if problem := _triton_cache_problem():
        logger.warning("GPU kernels are not used: %s.", problem)
        return problem
    if (
        torch.version.hip is None
        and torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY
    ):
        return "the GPU is older than compute capability 8.0"
    return ""


def _triton_cache_problem() -> str:
    """Return why Triton has no folder for compiled kernels, "" if it has one."""
    try:
        home = Path(os.environ.get("TRITON_HOME") or "~").expanduser()
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        return f"Triton has no cache folder, set TRITON_CACHE_DIR to a writable one ({error})"
    return ""


@assume_constant
def _report(backend: str, reason: str) -> str:
    """Log the choice; also runs, once, while a graph is being recorded."""
    _log("Focal modulation runs on the %s backend: %s.", backend, reason)
    return backend


@functools.cache
def _log(*message: str) -> None:
    logger.info(*message)
