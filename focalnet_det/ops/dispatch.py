"""Which implementation of a block runs: by device, type and availability, or by order.

``FOCALNET_DET_OPS`` forces a path: ``reference`` (the readable one), ``torch`` (fused, plain
PyTorch), ``native`` (the same with kernels in C++ on CPUs) or ``triton``. Unset, the fastest one
runs that can.
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

from .kernels import capabilities, native

VARIABLE = "FOCALNET_DET_OPS"
# Fastest first.
PATHS = ("triton", "native", "torch", "reference")

# What the Triton kernels take.
WIDEST, MOST_CHANNELS, OLDEST_GPU = 15, 4096, (8, 0)
# Tuples in kernels.
OLDEST_TRITON = "3.3"

logger = logging.getLogger(__name__)


def forced_path() -> str | None:
    """The path that the environment asks for, None without one.

    Raises: ValueError for an unknown one.
    """
    path = os.environ.get(VARIABLE) or None
    if path is not None and path not in PATHS:
        raise ValueError(f"{VARIABLE}={path}: must be one of {', '.join(sorted(PATHS))}.")
    return path


def constant(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, whose import takes as long as that of torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def using(path: str | None) -> Iterator[None]:
    """Forces a path for a while; None leaves the choice as it is."""
    before = os.environ.get(VARIABLE)
    if path is not None:
        os.environ[VARIABLE] = path
    try:
        yield
    finally:
        if path is not None:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before


def choose_path(
    x: Tensor, *, exact: Callable[[], bool] = lambda: True, windows: Sequence[int] = ()
) -> str:
    """The path for a block that gets ``x``; says so in the log once for each reason.

    Args:
        x: (N, H, W, C), input of the block.
        exact: whether the block's layers are the plain ones that the fused functions stand for.
        windows: kernel sizes of its focal levels.
    Raises: ValueError for an unknown path in the environment.
    """
    forced = forced_path()
    if forced == "reference":
        return forced
    if traced() or (exporting() and forced is None):
        # Such graphs are for other programs, which know stock operators alone.
        return "reference"
    obstacle = _obstacle(x, exact)
    if obstacle:
        return _report("reference", obstacle)
    reason = f"{VARIABLE} is {forced or 'unset'}"
    if forced == "triton" or (forced is None and x.device.type != "cpu"):
        missing = _triton_obstacle(x, windows)
        if not missing:
            return _report("triton", reason)
        # The plain PyTorch path cuts maps into tiles for the caches of CPUs.
        return _report("torch" if x.device.type == "cpu" else "reference", missing)
    if forced != "torch":
        missing = _native_obstacle(x.device.type, compute_dtype(x)[0])
        if not missing:
            return _report("native", reason)
        reason = missing
    return _report("torch", reason)


def traced() -> bool:
    """Whether ``torch.jit`` records a graph."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def exporting() -> bool:
    """Whether ``torch.export`` records a graph. False before PyTorch 2.7, which cannot tell."""
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and bool(is_exporting())


def compute_dtype(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Types in which to compute, and in which to return results and keep activations.

    The latter follows autocast and ``x``. The former is float32 on CPUs without bfloat16
    arithmetic, where oneDNN is_dtype_emulated it at a tenth of the speed.
    """
    device, stored = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        stored = torch.get_autocast_dtype(device)
    if device == "cpu" and stored in (torch.bfloat16, torch.float16) and not _fast(stored):
        return torch.float32, stored
    return stored, stored


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which operators of ``x`` keep the types that they are given."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def takes_patch_products(x: Tensor) -> bool:
    """Whether convolutions of ``x`` without overlap run as :mod:`.kernels.patches` says.

    On CPUs, unless the reference would run too, or a graph is recorded.
    """
    if x.device.type != "cpu" or forced_path() == "reference":
        return False
    if torch.compiler.is_compiling() or traced() or exporting():
        return False
    return not _obstacle(x, exact=lambda: True)


def supports_native(
    maps: Sequence[Tensor], dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> bool:
    """Whether a stock operator of maps of these types may run as a kernel in C++.

    On CPUs, unless another path is forced, a graph is recorded, or there are no such kernels.
    """
    if forced_path() not in (None, "native") or any(x.dtype not in dtypes for x in maps):
        return False
    if torch.compiler.is_compiling() or traced() or exporting():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return not any(_native_obstacle(x.device.type, x.dtype) for x in maps)


def is_dtype_emulated(x: Tensor) -> bool:
    """Whether a stock layer would emulate the type in which it is to compute, slowly.

    Never with the reference forced or while a graph is recorded.
    """
    if x.device.type != "cpu" or forced_path() == "reference":
        return False
    if torch.compiler.is_compiling() or traced():
        return False
    dtype, stored = compute_dtype(x)
    return dtype != stored


@constant
def _fast(dtype: torch.dtype) -> bool:
    return capabilities.cpu().computes(dtype)


@constant
def _native_obstacle(device: str, dtype: torch.dtype) -> str:
    if device != "cpu":
        return f"the native kernels run on CPUs, not on {device}"
    if dtype not in native.DTYPES:
        return f"there are no native kernels for {dtype}"
    found = native.library()
    if isinstance(found, native.BuildError):
        return str(found)
    if torch.get_num_threads() > 1 and not found.parallel:
        return "the native kernels have found no OpenMP library for several threads"
    return ""


def _obstacle(x: Tensor, exact: Callable[[], bool]) -> str:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} is computed by the reference alone"
    if x.numel() == 0:
        return "the batch is empty"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if not exact():
        return "a block has hooks or layers of another class"
    return ""


def _triton_obstacle(x: Tensor, windows: Sequence[int]) -> str:
    if x.device.type not in ("cuda", "cpu"):
        return f"there are no kernels for {x.device.type}"
    missing = _triton_missing(x.device)
    if missing:
        return missing
    if not windows or max(windows) > WIDEST or x.shape[-1] > MOST_CHANNELS:
        return (
            f"the Triton kernels need 1 focal level or more, windows up to {WIDEST} and up to "
            f"{MOST_CHANNELS} channels"
        )
    return ""


@constant
def _triton_missing(device: torch.device) -> str:
    """Why Triton does not run on a device, or nothing."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no CPU kernels"
    return _triton_lacks(device)


@functools.cache
def _triton_lacks(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if TorchVersion(triton.__version__) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than 3.3, which PyTorch 2.7 brings"
    if device.type == "cpu":
        return ""
    if missing := _missing_triton_cache():
        logger.warning("GPU kernels are not used: %s.", missing)
        return missing
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return "the GPU is older than compute capability 8.0"
    return ""


def _missing_triton_cache() -> str:
    """Return why there is no folder for compiled kernels, which Triton needs, or nothing."""
    try:
        home = Path(os.environ.get("TRITON_HOME") or "~").expanduser()
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        return f"Triton has no cache, let TRITON_CACHE_DIR name a folder of yours ({error})"
    return ""


@constant
def _report(path: str, reason: str) -> str:
    """Also runs, once, where a graph is recorded."""
    _log("Focal modulation runs on the %s path: %s.", path, reason)
    return path


@functools.cache
def _log(*message: str) -> None:
    logger.info(*message)
