"""The installer of Detectron2, on small stand-ins for the archive; no network."""

import base64
import csv
import errno
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import TOOLS

sys.path.insert(0, str(TOOLS))
installer = importlib.import_module("install_detectron2")
wheels = importlib.import_module("detectron2_wheel")
patches = importlib.import_module("detectron2_patches")
sys.path.remove(str(TOOLS))

REAL_PYTHON = sys.executable
TREE = {
    "detectron2/__init__.py": "",
    "detectron2/modeling.py": "VALUE = 'old'\n",
    "detectron2/data.py": "",
    "detectron2/engine.py": "",
    "detectron2/evaluation.py": "",
    "detectron2/model_zoo/configs/a.yaml": "A: 1\n",
    "projects/PointRend/point_rend/__init__.py": "",
    "projects/DeepLab/deeplab/__init__.py": "",
    "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "",
    "LICENSE": "license text\n",
    "setup.py": "raise SystemExit('setup.py was run')\n",
}
EDIT = patches.Edit("detectron2/modeling.py", "'old'", "'new'", 1, "for the test")


def write_sdist(folder: Path, mtime: int = 0, names: list[str] | None = None) -> Path:
    path = folder / installer.SDIST_FILE
    with tarfile.open(path, "w:gz") as tar:
        for name in names or list(TREE):
            member = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            member.size = len(TREE[name])
            member.mtime = mtime
            tar.addfile(member, io.BytesIO(TREE[name].encode()))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a small archive that the installer takes for the published one."""
    folder = tmp_path / "cache"
    folder.mkdir()
    digest = hashlib.sha256(write_sdist(folder).read_bytes()).hexdigest()
    monkeypatch.setattr(installer, "SDIST_SHA256", digest)
    monkeypatch.setattr(wheels, "EDITS", (EDIT,))
    return folder


@pytest.fixture
def empty_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the installer work on a new, empty environment; returns its site-packages."""
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = str(env / "bin" / "python")

    def run_pip(*args: str) -> subprocess.CompletedProcess[str]:
        command = [REAL_PYTHON, "-m", "pip", "--python", python, *args]
        return subprocess.run(command, capture_output=True, text=True)

    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(installer, "run_pip", run_pip)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return next(env.glob("lib/python*/site-packages"))


def run(cache: Path, *options: str) -> int:
    return installer.main(["--cache-dir", str(cache), *options])


def test_installs_then_keeps_then_repairs(
    cache: Path, empty_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cache) == 0
    package = empty_python / "detectron2"
    assert (package / "modeling.py").read_text() == "VALUE = 'new'\n"
    assert "0.6+pure1 is installed" in capsys.readouterr().out
    check = subprocess.run(
        [sys.executable, "-c", "from detectron2 import _C"], capture_output=True, text=True
    )
    assert "ImportError: detectron2._C is missing: this is the pure-Python" in check.stderr

    (package / "modeling.py").write_text("VALUE = 'edited by the user'\n")
    assert run(cache) == 0
    assert "works; keeping it" in capsys.readouterr().out
    assert "edited by the user" in (package / "modeling.py").read_text()

    (package / "engine.py").write_text("half a fi")  # ours and broken: an interrupted install
    assert run(cache) == 0
    assert (package / "engine.py").read_text() == ""

    (package / "modeling.py").write_text("VALUE = 'edited by the user'\n")
    assert run(cache, "--force") == 0
    assert (package / "modeling.py").read_text() == "VALUE = 'new'\n"


def test_older_version_of_ours_is_replaced() -> None:
    old = installer.Installed("/somewhere", "0.6+pure0", True, "")
    assert installer.keep_installed(old) is False
    theirs = installer.Installed("/somewhere", "0.6", False, "")
    assert installer.keep_installed(theirs) is True


def test_broken_foreign_detectron2_is_reported_and_left_alone(
    cache: Path, empty_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = empty_python / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('boom 17')\n")
    assert run(cache) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: boom 17" in error
    assert "--force" in error
    assert error.count("\n") == 1
    assert [file.name for file in package.glob("*.py")] == ["__init__.py"]


def test_sources_in_the_working_folder_are_not_an_installation(
    empty_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert installer.inspect_installed().location is None


def test_left_over_folder_is_not_an_installation(empty_python: Path) -> None:
    (empty_python / "detectron2" / "__pycache__").mkdir(parents=True)
    assert installer.inspect_installed().location is None


def test_wrong_hash(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = cache / installer.SDIST_FILE
    expected = installer.SDIST_SHA256
    archive.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    assert run(cache, "--wheel-only", str(cache)) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert found in error
    assert not archive.exists()


def test_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    cache = tmp_path / "cache"
    assert run(cache, "--wheel-only", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "No matching distribution found" in error
    assert f"put a copy at {cache / installer.SDIST_FILE}" in error
    assert error.count("\n") == 1
    assert list(cache.iterdir()) == []


def test_download_runs_nothing_of_the_archive(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # setup.py of the archive raises SystemExit: pip would fail if it ran.
    source = tmp_path / "index"
    source.mkdir()
    (cache / installer.SDIST_FILE).rename(source / installer.SDIST_FILE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    archive = installer.fetch_sdist(cache)
    assert archive.read_bytes() == (source / installer.SDIST_FILE).read_bytes()
    assert [path.name for path in cache.iterdir()] == [installer.SDIST_FILE]


def test_download_with_a_wrong_hash(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    published = installer.SDIST_SHA256
    monkeypatch.setattr(installer, "SDIST_SHA256", "0" * 64)
    assert run(tmp_path / "other", "--wheel-only", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert published in error
    assert "0" * 64 in error
    assert list((tmp_path / "other").iterdir()) == []


def test_full_disk(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run(cache, "--wheel-only", str(cache)) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == [installer.SDIST_FILE]


def test_disk_filled_by_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    done = subprocess.CompletedProcess([], 1, "", text)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert run(tmp_path, "--wheel-only", str(tmp_path)) == 1
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "text"),
    [("pip", "-m ensurepip"), ("torch", "torch is not installed"), ("torchvision", "torchvision")],
)
def test_missing_requirement(
    missing: str,
    text: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(installer, "has_module", lambda name: name != missing)
    assert run(cache) == 1
    assert text in capsys.readouterr().err


def test_modules_are_found() -> None:
    assert installer.has_module("pip")
    assert not installer.has_module("no_such_module")


def test_old_python(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert run(cache) == 1
    assert "Python 3.10 or newer is needed, this is 3.9.18" in capsys.readouterr().err


def test_edit_that_does_not_match(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = patches.Edit("detectron2/modeling.py", "'old'", "'new'", 2, "for the test")
    monkeypatch.setattr(wheels, "EDITS", (twice,))
    assert run(cache, "--wheel-only", str(cache)) == 1
    assert "detectron2/modeling.py has \"'old'\" 1 times instead of 2" in capsys.readouterr().err
    assert not list(cache.glob("*.whl"))


def test_edit_of_a_missing_file() -> None:
    with pytest.raises(patches.PatchError, match=r"detectron2/modeling.py is missing"):
        patches.apply_edits({}, (EDIT,))


def test_wheel_is_reproducible_and_consistent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "EDITS", (EDIT,))
    built = []
    for number, names in enumerate((list(TREE), list(reversed(TREE)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        built.append(wheels.build_wheel(write_sdist(folder, 10**9 * number, names), folder))
    assert built[0].read_bytes() == built[1].read_bytes()

    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        info = wheels.DIST_INFO
        rows = list(csv.reader(wheel.read(f"{info}/RECORD").decode().splitlines()))
        assert sorted(row[0] for row in rows) == sorted(names)
        for name, digest, size in rows:
            if name != f"{info}/RECORD":
                content = wheel.read(name)
                sha = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
                assert digest == "sha256=" + sha.rstrip("=")
                assert int(size) == len(content)
        assert wheel.read(f"{info}/LICENSE") == b"license text\n"
        assert "Files were changed" in wheel.read(f"{info}/METADATA").decode()
    assert "detectron2/model_zoo/configs/a.yaml" in names
    projects = [f"detectron2/projects/{n}" for n in ("point_rend", "deeplab", "panoptic_deeplab")]
    assert {f"{project}/__init__.py" for project in projects} < set(names)
    assert not any("setup" in name for name in names)


def test_wheel_requires_what_setup_py_requires() -> None:
    """A requirement of the wheel that setup.py does not install would fail `pip check`."""
    lines = wheels.METADATA.splitlines()
    wanted = {line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist")}
    setup = (TOOLS.parent / "setup.py").read_text()
    assert len(wanted) == 16
    assert not {text for text in wanted if f'"{text}"' not in setup}


def test_every_edit_changes_something() -> None:
    assert len({(edit.file, edit.old) for edit in patches.EDITS}) == len(patches.EDITS)
    for edit in patches.EDITS:
        assert edit.old != edit.new
        assert edit.reason


# The Detectron2 that is really installed.

try:
    VERSION = metadata.version("detectron2")
except metadata.PackageNotFoundError:
    VERSION = ""
installed = pytest.mark.skipif(
    not VERSION.startswith("0.6+pure"), reason="Detectron2 was not installed by our installer"
)


@installed
def test_installed_stub_explains_itself() -> None:
    from detectron2.layers import nms_rotated

    with pytest.raises(ImportError, match="It lacks rotated boxes"):
        importlib.import_module("detectron2._C")
    with pytest.raises(ImportError, match="It lacks rotated boxes"):
        nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5)


@installed
def test_installed_environment_report() -> None:
    from detectron2.utils.collect_env import collect_env_info

    assert "not built correctly: detectron2._C is missing" in collect_env_info()


@installed
def test_installed_sources_have_no_removed_names() -> None:
    spec = importlib.util.find_spec("detectron2")
    assert spec is not None
    assert spec.origin is not None
    files = list(Path(spec.origin).parent.rglob("*.py"))
    assert len(files) > 150
    removed = ("np.int)", "np.float)", "np.bool)", "np.str)", "Image.LINEAR", "pkg_resources")
    found = [(file.name, name) for file in files for name in removed if name in file.read_text()]
    assert found == []


@installed
@pytest.mark.parametrize("groups", [1, 2])
def test_installed_deformable_convolution_without_offsets_is_a_convolution(groups: int) -> None:
    from detectron2.layers import DeformConv, ModulatedDeformConv

    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    offset = torch.zeros(2, 2 * 2 * 9, 7, 6)  # two deformable groups
    for layer in (
        DeformConv(4, 6, 3, padding=1, groups=groups, deformable_groups=2),
        ModulatedDeformConv(4, 6, 3, padding=1, groups=groups, deformable_groups=2),
    ):
        masks = (torch.full((2, 2 * 9, 7, 6), 0.5),) if layer.bias is not None else ()
        out = layer(x, offset, *masks)
        weight = layer.weight * (0.5 if masks else 1.0)
        expected = torch.nn.functional.conv2d(x, weight, layer.bias, padding=1, groups=groups)
        torch.testing.assert_close(out, expected)
        got, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
        torch.testing.assert_close(got, wanted)


@installed
def test_installed_loader_replaces_a_bad_sample() -> None:
    from detectron2.data import MapDataset

    dataset = MapDataset([0, 1], lambda value: None if value == 1 else value)
    assert dataset[0] == 0
    assert dataset[1] == 0


@installed
def test_installed_scheduler_state_is_saved() -> None:
    from detectron2.engine.hooks import LRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    scheduler.last_epoch = 12
    state = LRScheduler(optimizer, scheduler).state_dict()
    assert json.loads(json.dumps(state["last_epoch"])) == 12
