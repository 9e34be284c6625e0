"""Fixtures for the kernels in C++ and for Triton's backend."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from focalnet_det.ops.cpu import capabilities
from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.cpu import library_build as native_build
from focalnet_det.ops.focal_block import policy
from tests.helpers.small_library import SMALL


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is built or decided yet; a small source is, into this folder."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setattr(native_build, "SOURCE", source)
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    monkeypatch.delenv(capabilities.VARIABLE, raising=False)
    native.library.cache_clear()
    policy._log.cache_clear()
    yield tmp_path / "cache"
    native.library.cache_clear()
    policy._log.cache_clear()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been warned of since the last call; no warning tells of a traceback."""
    caplog.set_level(logging.INFO, logger="focalnet_det")

    def taken() -> list[str]:
        found = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert not any(r.exc_info for r in found)
        messages = [r.getMessage() for r in found]
        caplog.clear()
        return messages

    return taken


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernels are asked for, and nothing has been logged yet."""
    from triton.runtime import interpreter

    monkeypatch.setenv(policy.VARIABLE, "triton")
    # Half of the interpreter's time goes into checks for overflow of offsets, small ones here.
    quick = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)
    policy._log.cache_clear()
    yield
    policy._log.cache_clear()


@pytest.fixture
def library() -> native.Library:
    """From the cache of this machine, or built there."""
    found = native.library()
    assert isinstance(found, native.Library), found
    return found
