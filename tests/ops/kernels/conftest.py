"""Triton's path, in its interpreter where there is no GPU, and the library of the C++ kernels."""

from collections.abc import Iterator

import pytest

from focalnet_det.ops import dispatch
from focalnet_det.ops.kernels import native


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernels are asked for, and nothing has been logged yet."""
    from triton.runtime import interpreter

    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    # Half of the interpreter's time goes into checks for overflow of offsets, small ones here.
    quick = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)
    dispatch._log.cache_clear()
    yield
    dispatch._log.cache_clear()


@pytest.fixture
def library() -> native.Library:
    """From the cache of this machine, or built there."""
    found = native.library()
    assert isinstance(found, native.Library), found
    return found
