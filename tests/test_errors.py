"""Expected errors become one line and exit status 1; the others stay visible."""

import subprocess
import sys

import pytest

from focalnet_det.errors import one_line_errors


@pytest.fixture(autouse=True)
def _no_traceback_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOCALNET_DET_TRACEBACK", raising=False)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("No such config file: a.py."), "No such config file: a.py."),
        (KeyError("The config has no key 'b'."), "The config has no key 'b'."),
        (TypeError("Unknown option c."), "Unknown option c."),
        (FileNotFoundError(2, "No such file", "d"), "[Errno 2] No such file: 'd'"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
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


@pytest.mark.parametrize("kind", [AttributeError, IndexError, RuntimeError, ZeroDivisionError])
def test_defects_propagate(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="a defect"), one_line_errors():
        raise kind("a defect")


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
