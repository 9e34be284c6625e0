"""What `make` does before every target, without installing anything."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.paths import TOOLS

sys.path.insert(0, str(TOOLS))
bootstrap = importlib.import_module("bootstrap")
sys.path.remove(str(TOOLS))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A checkout in a temporary folder, and the commands that would have been run."""
    root = tmp_path / "checkout"
    for name in bootstrap.INPUTS:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    made: list[list[str]] = []

    def call(command: list[str], env: object = None, quiet: bool = False) -> None:
        if "--constraint" in command:
            text = Path(command[command.index("--constraint") + 1]).read_text()
            command = [*command, f"constraints: {text}"]
        made.append(command)

    monkeypatch.setattr(bootstrap, "ROOT", root)
    monkeypatch.setattr(bootstrap, "OWN_ENV", root / ".venv")
    monkeypatch.setattr(bootstrap, "call", call)
    return made


def make_env(folder: Path, **versions: str) -> Path:
    """An environment whose Python reports the given versions."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    report = f'{{"python": [3, 11, 7], "pip": true, "versions": {versions}}}'.replace("'", '"')
    python.write_text(f"#!/bin/sh\necho '{report}'\n")
    python.chmod(0o755)
    return folder


def test_active_environment_keeps_its_torch(calls: list[list[str]], tmp_path: Path) -> None:
    env = make_env(tmp_path / "conda env", torch="2.5.1+cu121", numpy="1.26.4")
    assert bootstrap.main([str(env)]) == 0
    assert [command[0] for command in calls] == [str(env / "bin" / "python")] * 2
    assert calls[0][-1] == "constraints: torch==2.5.1+cu121\nnumpy==1.26.4\n"
    assert "--upgrade" not in calls[0]
    assert calls[1][1:] == ["tools/install_detectron2.py"]

    assert bootstrap.main([str(env)]) == 0
    assert len(calls) == 2  # nothing is installed a second time
    (bootstrap.ROOT / "setup.py").write_text("another requirement")
    assert bootstrap.main([str(env)]) == 0
    assert len(calls) == 4


def test_own_environment_gets_the_tested_versions(calls: list[list[str]]) -> None:
    make_env(bootstrap.ROOT / ".venv", torch="2.5.1")
    assert bootstrap.main([".venv"]) == 0
    assert calls[0][-4:] == ["--upgrade", "pip", "setuptools", "wheel"]
    assert calls[1][-1] == "constraints: constraints.txt"  # the content of the test's file


# A Python whose pip finds three packages to install, and which notes what it is called with.
PIP = """#!/bin/sh
case "$*" in
  *--report*) echo '{"install": [
    {"is_direct": true, "metadata": {"name": "focalnet_det", "version": "1"}},
    {"is_direct": false, "metadata": {"name": "torch", "version": "2.14.1"}},
    {"is_direct": false, "metadata": {"name": "nvidia-cublas", "version": "13.1"}},
    {"is_direct": false, "metadata": {"name": "numpy", "version": "2.0"}}]}' ;;
  -c*) echo '{"python": [3, 11, 7], "pip": true, "versions": {}}' ;;
  *) echo "$*" >> CALLS ;;
esac
"""


def test_gpu_libraries_are_unpacked_beside_the_rest(calls: list[list[str]], tmp_path: Path) -> None:
    env, log = bootstrap.ROOT / ".venv", tmp_path / "calls"
    python = make_env(env) / "bin" / "python"
    python.write_text(PIP.replace("CALLS", str(log)))
    (env / "lib").mkdir()
    assert bootstrap.main([".venv"]) == 0
    pips = [line for line in log.read_text().splitlines() if "--no-deps" in line]
    ends = ["nvidia-cublas==13.1", "numpy==2.0"]
    assert sorted(line.split()[-1] for line in pips) == sorted(ends)
    assert any("torch==2.14.1 numpy==2.0" in line for line in pips)
    # All that they left undone, and the package.
    assert "--editable" in calls[1]
    assert "--no-deps" not in calls[1]


def test_an_index_that_cannot_be_asked_is_left_to_pip(
    calls: list[list[str]], tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    python = make_env(bootstrap.ROOT / ".venv") / "bin" / "python"
    silent = PIP.replace("*--report*)", "*--report*) exit 1 ;;\n  never)")
    python.write_text(silent.replace("CALLS", str(log)))
    assert bootstrap.main([".venv"]) == 0
    assert "--editable" in calls[1]
    assert "--no-deps" not in log.read_text()


def test_packages_of_the_tests_come_when_asked_for(calls: list[list[str]], tmp_path: Path) -> None:
    env = make_env(tmp_path / "env", torch="2.5.1")

    def installed(*options: str) -> list[str]:
        calls.clear()
        assert bootstrap.main([str(env), *options]) == 0
        return [command[command.index("--editable") + 1] for command in calls[:1]]

    assert installed() == ["."]
    assert installed("--tests") == [".[test]"]
    # Who has them has all the rest.
    assert installed("--tests") == installed() == []


def test_bytecode_is_written_for_modules_that_are_imported_and_can_be_compiled(
    tmp_path: Path,
) -> None:
    # Only names below the packages count.
    env = tmp_path / "tests" / "env"
    modules = env / "lib" / "python3.11" / "site-packages"
    rare = modules / "torch" / "testing" / "common.py"
    rare.parent.mkdir(parents=True)
    rare.write_text("x = 1\n")
    (modules / "good.py").write_text("x = 1\n")
    (modules / "template.py").write_text("class {{ name }}:\n")
    (env / "bin").mkdir()
    (env / "bin" / "python").symlink_to(sys.executable)
    bootstrap.compile_modules(env, ".")
    (compiled,) = (modules / "__pycache__").iterdir()
    assert compiled.name.startswith("good.")
    assert not (rare.parent / "__pycache__").exists()


def test_failure_leaves_no_stamp(
    calls: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    env = make_env(tmp_path / "env", torch="2.5.1")
    good = bootstrap.call

    def fail(command: list[str], env: object = None, quiet: bool = False) -> None:
        raise bootstrap.SetupError("no network")

    monkeypatch.setattr(bootstrap, "call", fail)
    assert bootstrap.main([str(env)]) == 1
    assert capsys.readouterr().err == "make: error: no network\n"
    monkeypatch.setattr(bootstrap, "call", good)
    assert bootstrap.main([str(env)]) == 0
    assert calls


@pytest.mark.parametrize(
    ("torch", "status"), [("2.3.1", 1), ("1.13", 1), ("2.4.0", 0), ("2.10.0a0+git1", 0)]
)
def test_torch_of_the_active_environment(
    torch: str, status: int, calls: list[list[str]], tmp_path: Path
) -> None:
    assert bootstrap.main([str(make_env(tmp_path / "env", torch=torch))]) == status
    assert len(calls) == 2 * (1 - status)


def test_environment_that_does_not_exist(
    calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bootstrap.main([str(tmp_path / "nowhere")]) == 1
    assert "ENV_DIR" in capsys.readouterr().err


def test_debian_without_venv(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "find_spec", lambda _: None)
    assert bootstrap.main([".venv"]) == 1
    assert f"apt install python3.{sys.version_info[1]}-venv" in capsys.readouterr().err


def test_full_disk(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = SimpleNamespace(free=3 * 10**9)
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: free)
    assert bootstrap.main([".venv"]) == 1
    assert "3.0 GB free, but the environment needs about 8 GB" in capsys.readouterr().err
    assert calls == []


def test_small_temporary_folder_is_replaced(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    folder = bootstrap.ROOT / ".cache" / "tmp"
    assert bootstrap.pip_environment()["TMPDIR"] == str(folder)
    assert folder.is_dir()


def test_quiet_command_shows_its_output_when_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    bootstrap.call([sys.executable, "-c", "print('fine')"], quiet=True)
    assert capsys.readouterr().err == ""
    with pytest.raises(bootstrap.SetupError, match="it will resume"):
        bootstrap.call([sys.executable, "-c", "print('why'); exit(3)"], quiet=True)
    assert "why" in capsys.readouterr().err


def test_makefile_refuses_an_old_python() -> None:
    command = ["make", "-s", "install", "PYTHON=no_such_python"]
    done = subprocess.run(command, cwd=TOOLS.parent, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("Python 3.10 or newer is needed; 'no_such_python' is older")
