"""Tile sizes that Triton keeps on disk: damaged files, and folders that take none."""

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from focalnet_det.ops.focal_block import policy

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import inspect

import triton

if "cache_results" not in inspect.signature(triton.autotune).parameters:
    pytest.skip("Triton before 3.4 keeps no choices", allow_module_level=True)

import triton.language as tl
from triton.runtime.jit import JITFunction

CHOICES = (({"ROWS": 16}, 4), ({"ROWS": 64}, 8))
# Seconds that each takes: the second is the fastest.
SECONDS = {16: 2.0, 64: 1.0}


def add_one(x, count, C: tl.constexpr, ROWS: tl.constexpr):
    pass


add_one.__annotations__ = dict.fromkeys(("C", "ROWS"), tl.constexpr)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, int]]:
    """Launches as a new process would; returns rows of a tile and how often tiles were timed.

    For a GPU that is not there: programs are neither compiled nor run.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from focalnet_det.ops.focal_block.triton import triton_launch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_benchmarker=lambda: None
    )
    name = "_active" if hasattr(driver, "_active") else "active"
    monkeypatch.setattr(driver, name, stub)

    def one_launch(error: Exception | None = None) -> tuple[int, int]:
        ran: list[int] = []
        timed: list[int] = []

        def bench(self: Any, *_: object, config: Any, **__: object) -> float:
            if error is not None:
                raise error
            timed.append(config.kwargs["ROWS"])
            return SECONDS[config.kwargs["ROWS"]]

        monkeypatch.setattr(triton.runtime.Autotuner, "_bench", bench)
        monkeypatch.setattr(JITFunction, "run", lambda *_, ROWS, **__: ran.append(ROWS))
        kernel = triton_launch.Kernel(add_one, ["C"], CHOICES)
        kernel((1,), torch.zeros(8), 3, C=8)
        (rows,) = ran
        assert sorted(timed) in ([], [16, 64])
        return rows, len(timed)

    return one_launch


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Messages since the last call."""

    def taken() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        caplog.clear()
        return found

    return taken


def kept(folder: Path) -> Path:
    (file,) = folder.glob("*/add_one.autotune.json")
    return file


def test_choices_are_kept(launch: Callable, warned: Callable, tmp_path: Path) -> None:
    assert launch() == (64, 2)
    assert kept(tmp_path)
    assert launch() == (64, 0)
    # What is read is what the file says.
    content = json.loads(kept(tmp_path).read_text())
    for pair in content["configs_timings"]:
        pair[1] = -pair[1]
    kept(tmp_path).write_text(json.dumps(content))
    assert launch() == (16, 0)
    assert not warned()


def other_tiles(text: str) -> str:
    return text.replace('"ROWS": 64', '"ROWS": 8192')


DAMAGES = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "zeros": lambda text: "\0" * len(text),
    "a list": lambda text: "[]",
    "nothing in it": lambda text: '{"key": [], "configs_timings": []}',
    "no pairs": lambda text: '{"configs_timings": [1, 2]}',
    "unknown fields": lambda text: text.replace("num_warps", "num_threads"),
    "tiles that nobody offered": other_tiles,
    "a page of HTML": lambda text: "<!DOCTYPE html>",
    "no text": lambda text: "\udcff",
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_made_again(
    case: str, launch: Callable, warned: Callable, tmp_path: Path
) -> None:
    launch()
    file = kept(tmp_path)
    whole = file.read_text()
    file.write_bytes(DAMAGES[case](whole).encode(errors="surrogateescape"))
    assert launch() == (64, 2)
    (message,) = warned()
    assert message.startswith("The file of tile sizes of add_one is damaged, they are timed again")
    assert json.loads(kept(tmp_path).read_text()) == json.loads(whole)
    assert launch() == (64, 0)
    assert not warned()


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, os.strerror(28))


def test_a_folder_that_takes_no_file(
    launch: Callable, warned: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.runtime.cache.FileCacheManager.put", refuse)
    assert launch() == (64, 2)
    assert warned() == ["Tile sizes of add_one cannot be kept: [Errno 28] No space left on device."]


def test_a_damaged_file_that_cannot_be_removed(
    launch: Callable, warned: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch()
    kept(tmp_path).write_text("{")
    monkeypatch.setattr(Path, "unlink", refuse)
    assert launch() == (64, 2)
    (message,) = warned()
    assert "is damaged" in message


def test_faults_of_a_kernel_are_not_taken_for_those_of_the_file(
    launch: Callable, warned: Callable
) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        launch(RuntimeError("out of memory"))
    assert not warned()


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_without_a_folder_no_kernel_is_compiled(
    variable: str, warned: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / "x"))
    policy._triton_environment.cache_clear()
    reason = policy._triton_unavailable(torch.device("cuda"))
    policy._triton_environment.cache_clear()
    assert "Triton has no cache folder, set TRITON_CACHE_DIR to a writable one" in reason
    assert warned() == [f"GPU kernels are not used: {reason}."]
    monkeypatch.setenv(variable, str(tmp_path / "new" / "x"))
    assert not policy._triton_cache_problem()
    assert (tmp_path / "new" / "x").is_dir()
