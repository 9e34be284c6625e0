"""Compilers and libraries that fail: a warning says why, and blocks run all the same."""

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from focalnet_det.ops.cpu import capabilities
from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.cpu import library_build as native_build
from focalnet_det.ops.focal_block import policy
from tests.helpers.paths import ROOT
from tests.helpers.random_blocks import block
from tests.helpers.small_library import (
    SMALL,
    Warnings,
    again,
    assert_blocks_run_without,
    assert_loaded,
    needs_compiler,
)

pytestmark = pytest.mark.usefixtures("cache")

# Compilers


def script(folder: Path, body: str) -> str:
    """A compiler that knows its version and otherwise does what a shell script says."""
    file = folder / "compiler"
    file.write_text(f'#!{shutil.which("sh")}\n[ "$1" = --version ] && echo 1 && exit 0\n{body}\n')
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
    return str(file)


OUT = 'for last; do :; done; out="$last"'
COMPILERS = {
    "missing": ("no-such-compiler", "there is no C++ compiler (no-such-compiler)"),
    "a folder": ("/", "there is no C++ compiler (/)"),
    "unparsable": ("g++ 'x", "CXX=g++ 'x cannot be read: No closing quotation"),
    "bytes that are no text": ("g\udcffx", "there is no C++ compiler (g\\udcffx)"),
    "without a version": ("false", "false fails: "),
    "writes nothing": ("true", "true reports success but has made no library"),
    "no program": ("{folder}/small.cpp", "there is no C++ compiler"),
}
SCRIPTS = {
    "an error": ('echo note; echo "x.cpp:1: error: no such CPU" >&2; exit 1', "x.cpp:1: error: no"),
    "another language": (
        '[ "$LC_ALL" = C ] && echo "an error in English"; exit 1',
        "an error in En",
    ),
    "no word": ("exit 3", "compiler fails with code 3"),
    "other words": ("echo Auweh; exit 1", "compiler fails: Auweh"),
    "Latin-1": (
        "printf 'gef\\344hrlicher error \\374\\n' >&2; exit 1",
        "gef\\xe4hrlicher error \\xfc",
    ),
    "a full disk": ("echo 'a.s: No space left on device' >&2; exit 1", "No space left on device"),
    "killed": ("kill -9 $$", "compiler is ended by SIGKILL"),
    "no library": (f"{OUT}; echo nothing > $out", "compiler built do not work: "),
    "an empty file": (f"{OUT}; : > $out", "compiler built do not work: "),
    "a folder": (f"{OUT}; mkdir $out", "has made no library"),
}


@pytest.mark.parametrize("case", COMPILERS)
def test_commands_that_are_no_compiler(
    case: str, tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, reason = COMPILERS[case]
    monkeypatch.setenv("CXX", command.format(folder=tmp_path))
    assert_blocks_run_without(reason, warnings)


@pytest.mark.parametrize("case", SCRIPTS)
def test_compilers_that_fail(
    case: str, cache: Path, tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, reason = SCRIPTS[case]
    monkeypatch.setenv("CXX", script(tmp_path, body))
    assert_blocks_run_without(reason, warnings)
    assert [file.name for file in cache.iterdir()] in ([], ["lock"]), "something is left"


def test_without_any_compiler(
    cache: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", "")
    assert_blocks_run_without(
        "there is no C++ compiler (g++, clang++, c++). Install a C++ compiler (g++ or clang++), or "
        "name one in CXX;",
        warnings,
    )
    assert not cache.exists()


def test_a_hanging_compiler_is_ended_with_what_it_started(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "COMPILE_SECONDS", 0.5)
    # The sleeping one holds the pipes of the other open.
    monkeypatch.setenv("CXX", script(tmp_path, f"sleep 600 & echo $! > {tmp_path}/child; wait"))
    assert_blocks_run_without("compiler has not ended after 0.5 s", warnings)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        # Until somebody takes note of its end it stays as a zombie.
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the compiler started goes on")


def test_a_compiler_that_says_no_version(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "ANSWER_SECONDS", 0.5)
    file = tmp_path / "asks"
    file.write_text(f"#!{shutil.which('sh')}\nread answer && exit 0\nsleep 600\n")
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))
    assert_blocks_run_without("asks has not ended after 0.5 s", warnings)


LIBRARIES = {
    "no functions": ("", "undefined symbol: focalnet_set_threads"),
    "other results": (SMALL.replace("0.84", "0.74"), "GELU(1) is 0.74"),
    "other results in 16 bits": (SMALL.replace("0x3f57", "0x3f67"), "GELU(1) is 16231"),
    "instructions that the CPU lacks": (
        SMALL.replace("long focalnet", "int first = (__builtin_trap(), 1); long focalnet"),
        "built end their process by SIG",
    ),
    "a missing library": ('extern "C" void gone(); int first = (gone(), 1);' + SMALL, "gone"),
}


@needs_compiler
@pytest.mark.parametrize("case", LIBRARIES)
def test_libraries_that_do_not_work_are_tried_elsewhere(
    case: str, cache: Path, warnings: Warnings
) -> None:
    """In a process of their own, before any other loads them."""
    source, reason = LIBRARIES[case]
    native_build.SOURCE.write_text(source)
    assert_blocks_run_without(reason, warnings)
    assert not list(cache.glob("*.so"))


@needs_compiler
def test_a_library_that_hangs(warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "ANSWER_SECONDS", 2)
    wait = "#include <unistd.h>\nint first = sleep(600);"
    native_build.SOURCE.write_text(wait + SMALL)
    assert_blocks_run_without("built do not end", warnings)


@needs_compiler
def test_a_library_without_a_function_that_python_asks_for(warnings: Warnings) -> None:
    native_build.SOURCE.write_text(SMALL.replace("focalnet_has_tiles", "focalnet_other"))
    assert_blocks_run_without("undefined symbol: focalnet_has_tiles", warnings)


@needs_compiler
@pytest.mark.parametrize("python", ["", "no-such-python", "false"])
def test_without_a_python_to_try_a_library_it_is_loaded_untried(
    python: str, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python and (shutil.which(python) or python))
    assert_loaded(warnings)


def test_an_interrupt_ends_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def interrupt(self: subprocess.Popen, timeout: float) -> None:
        seen.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        native_build.run(["sleep", "600"], 600)
    assert seen[0].returncode == -signal.SIGKILL


@needs_compiler
def test_a_full_disk_for_all_files(tmp_path: Path) -> None:
    """Also for what the compiler writes, which the system ends for it."""
    code = (
        "import logging, resource, torch, focalnet_det; logging.basicConfig(); "
        "from pathlib import Path; from focalnet_det.ops.cpu import library_build as native_build; "
        f"native_build.SOURCE = Path({str(native_build.SOURCE)!r}); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
        "net = focalnet_det.create_backbone('focalnet_nano').eval(); "
        "print(net(torch.zeros(1, 3, 32, 32))['stage1'].shape)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"FOCALNET_DET_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, " in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.count("WARNING") == 1
    assert "Blocks run without native kernels" in done.stderr


def test_any_other_fault(warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("never thought of")

    monkeypatch.setattr(native_build, "build_key", fail)
    assert_blocks_run_without("RuntimeError: never thought of", warnings)


def test_sources_that_are_not_installed(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "SOURCE", tmp_path / "gone.cpp")
    monkeypatch.setenv("CXX", script(tmp_path, "exit 1"))
    assert_blocks_run_without("the sources cannot be read", warnings)


def test_a_cpu_that_can_do_more_than_this_one(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesser = capabilities.Capabilities(avx2=True)
    monkeypatch.setattr(capabilities, "detect", lambda: lesser)
    monkeypatch.setenv("CXX", script(tmp_path, "exit 1"))
    monkeypatch.setenv(capabilities.VARIABLE, "bf16")
    assert_blocks_run_without(
        "FOCALNET_DET_CPU=bf16 names a CPU with avx512, bfloat16, which this one lacks", warnings
    )
    monkeypatch.setenv(capabilities.VARIABLE, "avx3")
    with pytest.raises(ValueError, match="FOCALNET_DET_CPU=avx3: must be one of"):
        again()


def test_unset_and_forced_paths_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    x = torch.randn(1, 4, 5, 8)
    for forced, path in (("", "torch"), ("native", "torch"), ("reference", "reference")):
        monkeypatch.setenv(policy.VARIABLE, forced)
        assert policy.choose_backend(x) == path
    assert "no-such-compiler" in str(native.library())


def test_nothing_is_built_where_another_path_is_asked_for(
    warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for path in ("torch", "reference"):
        monkeypatch.setenv(policy.VARIABLE, path)
        block(2, 3, 8)(torch.randn(1, 4, 5, 8))
    assert not warnings()


# The kernels themselves


@needs_compiler
def test_the_default_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    caplog.set_level(logging.INFO, logger=policy.__name__)
    native.library.cache_clear()
    module, x = block(2, 3, 8), torch.randn(1, 4, 5, 8)
    for _ in range(2):
        assert module(x).isfinite().all()
    assert [record.getMessage() for record in caplog.records] == [
        "Focal modulation runs on the native backend: FOCALNET_DET_OPS is unset."
    ]


LEVELS = [name for name, level in capabilities.LEVELS.items() if not capabilities.missing(level)]
# Built and compared with the reference for a lesser CPU: half of the vectors' width, no FMA.
COMPARE = """
import torch
from tests.helpers.compare import relative_error
from tests.helpers.random_blocks import block
from focalnet_det.ops.focal_block import policy
from focalnet_det.ops.cpu import library as native

torch.set_num_threads(1)
library = native.library()
assert isinstance(library, native.Library), library
for levels, window, dim, size in ((2, 3, 96, (23, 37)), (3, 9, 13, (4, 40)), (1, 3, 40, (5, 6))):
    module, x = block(levels, window, dim), torch.randn(2, *size, dim)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 6e-2)):
        results = {}
        for path in ("reference", "native"):
            with policy.force_backend(path):
                # The reference is in float32, of the same rounded numbers.
                kind = torch.float32 if path == "reference" else dtype
                module = module.to(dtype).to(kind)
                leaf = x.to(dtype).to(kind).detach().requires_grad_()
                module.zero_grad()
                with torch.no_grad():
                    inference = module(leaf)
                out = module(leaf)
                out.float().pow(3).sum().backward()
                gradients = [p.grad.clone() for p in module.parameters()]
                results[path] = [inference, out.detach(), leaf.grad, *gradients]
        for ours, wanted in zip(results["native"], results["reference"], strict=True):
            assert relative_error(ours, wanted) <= tolerance, (dtype, levels)
print("equal")
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="levels of x86-64")
@pytest.mark.parametrize("level", [name for name in LEVELS if name in ("none", "avx2")])
def test_kernels_built_for_lesser_cpus(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # they are kept in this machine's cache
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        capabilities.VARIABLE: level,
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "equal", done.stderr
