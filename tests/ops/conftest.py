"""Fixtures for building and loading the kernels in C++."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from focalnet_det.ops import dispatch
from focalnet_det.ops.kernels import capabilities, native, native_build
from tests.helpers.small_library import SMALL


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is built or decided yet; a small source is, into this folder."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setattr(native_build, "SOURCE", source)
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv(capabilities.VARIABLE, raising=False)
    native.library.cache_clear()
    dispatch._log.cache_clear()
    yield tmp_path / "cache"
    native.library.cache_clear()
    dispatch._log.cache_clear()


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
