"""Bad input and bad surroundings become one sentence, defects a line that says so."""

import concurrent.futures
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from focalnet_det import errors
from focalnet_det.atomic import write_text
from focalnet_det.errors import one_line_errors, read_failure
from tests.helpers.processes import run_program


@pytest.fixture(autouse=True)
def _no_traceback_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOCALNET_DET_TRACEBACK", raising=False)
    # A run of another test may have left its log open.
    monkeypatch.setattr(logging.getLogger("focalnet_det"), "handlers", [])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("No such config file: a.py."), "No such config file: a.py."),
        (KeyError("The config has no key 'b'."), "The config has no key 'b'."),
        (TypeError("Unknown option c."), "Unknown option c."),
        (FileNotFoundError(2, "No such file", "d"), "[Errno 2] No such file: 'd'"),
        (
            OSError(28, "No space left on device", "e.pth"),
            "[Errno 28] No space left on device: 'e.pth'. Free some disk space; training then "
            "continues with --resume.",
        ),
        (ImportError("needs Detectron2"), "needs Detectron2"),
        (ModuleNotFoundError("No module named 'e'"), "No module named 'e'"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (ValueError("two\n  lines\n"), "two lines"),
        (ValueError(), "ValueError"),
        (KeyError(), "KeyError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_expected_errors(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise error
    assert exit_info.value.code == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {line}\n"
    assert captured.out == ""


def key() -> None:
    {}["image"]


def attribute() -> None:
    print(None.image)  # type: ignore[attr-defined]


def index() -> None:
    [][3]


def call() -> None:
    len(3)  # type: ignore[arg-type]


def shapes() -> None:
    torch.zeros(2) + torch.zeros(3)


def assertion() -> None:
    assert not os.sep, "hm"


def passed_on() -> None:
    try:
        int("y")
    except ValueError:
        raise


def in_a_block() -> None:
    with open(os.devnull):
        int("y")


def module() -> None:
    print(torch.nn.Identity().wrong)  # raised by a statement, in PyTorch


DEFECTS = {
    key: "KeyError: image (",
    attribute: "AttributeError: 'NoneType' object has no attribute 'image' (",
    index: "IndexError: list index out of range (",
    call: "TypeError: object of type 'int' has no len() (",
    shapes: "RuntimeError: The size of tensor a (2) must match the size of tensor b (3) at",
    assertion: "AssertionError: hm",
    passed_on: "ValueError: invalid literal for int() with base 10: 'y' (",
    in_a_block: "ValueError: invalid literal for int() with base 10: 'y' (",
    module: "AttributeError: 'Identity' object has no attribute 'wrong' (",
}


def line_of(function: Callable[[], None]) -> int:
    """The last line of a function that raises there or in its `try` block."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.traceback[-1].lineno + 1


@pytest.mark.parametrize("function", DEFECTS, ids=lambda f: f.__name__)
def test_defects(function: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        function()
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {DEFECTS[function]}")
    if function is not module:
        assert f"({__file__}:{line_of(function)})" in line
    assert line.endswith(
        "This is a defect, or input that is not checked; set FOCALNET_DET_TRACEBACK=1 to see more."
    )


def test_the_place_of_a_defect_is_in_the_package_if_it_can_be() -> None:
    with pytest.raises(TypeError) as caught:
        write_text(3, "text")  # type: ignore[arg-type]
    failure = read_failure(caught.value)
    assert failure.location.startswith("focalnet_det/atomic.py:")
    assert "pathlib" in failure.trace


class Failing(Dataset[int]):
    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        self.function()
        return index


def refused() -> None:
    raise ValueError(
        "a.jpg is 12x9 px; "
        f"the annotations say {12}x{10}."
    )  # fmt: skip


def chained() -> None:
    try:
        {}["image"]
    except KeyError as error:
        raise KeyError("b.json, row 3: no 'image'.") from error


def missing() -> None:
    Path("/none/c.jpg").read_bytes()


def undecodable() -> None:
    b"\xff".decode()


DELIBERATE = {
    refused: "a.jpg is 12x9 px; the annotations say 12x10.",
    chained: "b.json, row 3: no 'image'.",
    missing: "[Errno 2] No such file or directory: '/none/c.jpg'",
}
UNDECODABLE = "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid "
ELSEWHERE = DELIBERATE | DEFECTS | {undecodable: UNDECODABLE}


@pytest.fixture(scope="module")
def in_a_loader() -> dict[Any, errors.Failure]:
    """Failures of a loader process, by the function that failed in it."""
    failures = {}
    for function in ELSEWHERE:
        try:
            list(DataLoader(Failing(function), num_workers=1))
        except Exception as error:
            failures[function] = read_failure(error)
            error.__traceback__ = None
    return failures


@pytest.fixture(scope="module")
def in_a_pool() -> dict[Any, errors.Failure]:
    """Failures of a process of a pool."""
    failures = {}
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        for function in ELSEWHERE:
            try:
                pool.submit(function).result()
            except Exception as error:
                failures[function] = read_failure(error)
    return failures


@pytest.mark.parametrize("where", ["in_a_loader", "in_a_pool"])
@pytest.mark.parametrize("function", ELSEWHERE, ids=lambda f: f.__name__)
def test_errors_of_other_processes(
    function: Callable[[], None], where: str, request: pytest.FixtureRequest
) -> None:
    failure = request.getfixturevalue(where)[function]
    assert failure.is_expected == (function in DELIBERATE)
    sentence = failure.summary()
    if function in DELIBERATE:
        assert sentence == DELIBERATE[function]
    else:
        assert sentence.startswith(ELSEWHERE[function])
        assert "DataLoader" not in sentence
        assert "Traceback" not in sentence
    assert f"in {function.__name__}\n" in failure.trace


def test_traceback_goes_to_the_log_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("focalnet_det")
    handlers = [logging.FileHandler(tmp_path / "log.txt"), logging.StreamHandler(sys.stdout)]
    for handler in handlers:
        logger.addHandler(handler)
    try:
        for function in (refused, key):
            with pytest.raises(SystemExit), one_line_errors():
                function()
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    bad, defect = captured.err.splitlines()
    assert bad == f"error: {DELIBERATE[refused]}"
    assert defect.endswith(f"the traceback is in {tmp_path / 'log.txt'}.")
    log = (tmp_path / "log.txt").read_text()
    assert log.count("Traceback") == 2
    assert "in refused\n" in log
    assert "in key\n" in log


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        # Texts as PyTorch, NCCL and the kernel print them.
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "The GPU is out of memory:"),
        ("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you "
         "tried to allocate 80 bytes.", "This machine is out of memory"),
        ("The server socket has failed to listen on any local network address. port: 29500, "
         "useIpv6: false, code: -98, name: EADDRINUSE", "The port of --dist-url"),
        ("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.",
         "Some machines or processes"),
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1234",
         "Another process of this job has ended"),
        ("[../gloo/transport/tcp/pair.cc:534] Read error [10.0.0.1]:1234: Connection reset by "
         "peer", "Another process of this job has ended"),
        ("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network "
         "error", "Another process of this job has ended"),
    ],
)  # fmt: skip
def test_surroundings(text: str, sentence: str) -> None:
    failure = read_failure(RuntimeError(text))
    assert failure.summary().startswith(sentence)
    assert failure.is_consequence == sentence.startswith("Another process")


def script(code: str, side: int = 8, first: str = "") -> str:
    """Keep all batches of a loader process, of images of this side, under `one_line_errors`."""
    return f"""
import os
{first}
from focalnet_det.errors import one_line_errors
with one_line_errors():
    import torch
    from torch.utils.data import DataLoader, Dataset
    class Images(Dataset):
        def __len__(self):
            return 256
        def __getitem__(self, index):
            {code}
            return torch.zeros(3, {side}, {side})
    images = list(DataLoader(Images(), num_workers=1, batch_size=2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_dead_loader_process(number: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(script(f"os.kill(os.getpid(), {number:d}) if index > 8 else 0"))
    result = run_program(program)
    assert result.returncode == 1
    assert "error: A data loader process died (" in result.stderr
    assert "lower num_workers" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_few_open_files(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    program.write_text(script("pass", first=limit))
    result = run_program(program)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Too many files are open: raise the limit (ulimit -n 65536)")


@pytest.mark.slow
def test_full_shared_memory() -> None:
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm && "
    attempt = subprocess.run(["unshare", "-m", "sh", "-c", mount + "true"], capture_output=True)
    if attempt.returncode:
        pytest.skip("mounting a small /dev/shm is not permitted here")
    command = ["unshare", "-m", "sh", "-c", mount + 'exec "$@"', "sh"]
    command += [sys.executable, "-c", script("pass", side=512)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 1
    assert "error: The shared memory (/dev/shm) is full: enlarge it" in result.stderr
    assert "Traceback" not in result.stderr


def test_interruption_exits_as_shells_expect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise KeyboardInterrupt
    assert exit_info.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCALNET_DET_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad input"), one_line_errors():
        raise ValueError("bad input")


def test_no_error_does_not_exit() -> None:
    reached = []
    with one_line_errors():
        reached.append(True)
    assert reached


def test_status_of_a_process() -> None:
    code = (
        "from focalnet_det.errors import one_line_errors\n"
        "with one_line_errors():\n"
        "    raise KeyError('no key x')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: no key x\n")
