"""A library that is quick to build, and what loading it or doing without it looks like."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.cpu import library_build as native_build
from focalnet_det.ops.focal_block import policy
from tests.helpers.random_blocks import block

Warnings = Callable[[], list[str]]
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, native_build.COMPILERS), None)
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason=f"no C++ compiler: none of {', '.join(native_build.COMPILERS)} nor CXX"
)
# What every process has to find, quick to build: GELU(1), in both types, whatever the input.
SMALL = """
extern "C" {
void focalnet_set_threads(void*) {}
void focalnet_set_gemm(void*) {}
long focalnet_has_tiles() { return 0; }
struct Call {
  const void *x, *bias;
  const float* valid;
  void* out;
  long rows, c, threads, sixteen;
};
void focalnet_gelu(const Call* p) {
  for (long i = 0; i < p->rows * p->c; i++) {
    if (p->sixteen) ((unsigned short*)p->out)[i] = 0x3f57;
    else ((float*)p->out)[i] = 0.8413447f;
  }
}
}
"""


def again() -> "native.Library | native.BuildError":
    """As a new process would ask."""
    native.library.cache_clear()
    return native.library()


def assert_blocks_run_without(reason: str, warnings: Warnings) -> None:
    """There is one warning, which says why and what to do, and PyTorch's path runs."""
    native.library.cache_clear()
    module, x = block(2, 3, 8), torch.randn(1, 4, 5, 8)
    with torch.no_grad():
        results = [module(x), module(x)]
        with policy.force_backend("torch"):
            expected = module(x)
    assert isinstance(native.library(), native.BuildError)
    assert all(torch.equal(result, expected) for result in results)
    (message,) = warnings()
    assert message.startswith("Blocks run without native kernels, more slowly: ")
    assert reason in message
    assert message.endswith("; FOCALNET_DET_OPS=torch is the same without this warning.")


def assert_loaded(warnings: Warnings, reason: str | None = None, ending: str = "") -> None:
    """There are kernels, and one warning with a reason and an ending, or none."""
    assert isinstance(again(), native.Library)
    found = warnings()
    if reason is None:
        assert not found
        return
    (message,) = found
    assert message.startswith("Native kernels: ")
    assert reason in message
    assert message.endswith(ending)


ALONE = "process alone, as they will be each time: let FOCALNET_DET_CACHE name a folder of yours."
AGAIN = "They were built again."


def built(cache: Path) -> Path:
    (file,) = cache.glob("*.so")
    return file
