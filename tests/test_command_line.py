"""Every tool is a command, and an installation outside a checkout has all it needs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from focalnet_det import __version__, command_line
from focalnet_det.command_line import COMMANDS, main
from focalnet_det.resources import find_config, list_configs
from tests.helpers.paths import CONFIGS, ROOT, TOOLS

# Scripts for developers of this package, and parts of other scripts.
NO_COMMANDS = {
    *("bootstrap.py", "detectron2_patches.py", "check_zoo.py", "inspect_kernels.py"),
    *("benchmark_evaluation.py", "detectron2_wheel.py", "ade20k_script.py"),
}


def test_every_script_is_a_command() -> None:
    scripts = {command.script for command in COMMANDS.values()}
    files = [*TOOLS.glob("*.py"), *(ROOT / "datasets").glob("*.py")]
    assert {f"{p.parent.name}/{p.name}" for p in files if p.name not in NO_COMMANDS} <= scripts


def test_commands_are_listed_and_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"focalnet-det {__version__}\n"
    main(["configs", "keypoint_rcnn_resnet"])
    assert "configs/COCO-Keypoints/keypoint_rcnn_resnet50_fpn_1x.py\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["tran"])
    assert "Unknown command 'tran'. Known: train, evaluate," in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: focalnet-det predict ")


def test_evaluate_is_train_with_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(command_line, "run", lambda name, rest: called.append((name, rest)))
    main(["evaluate", "--output", "x"])
    assert called == [("evaluate", ["--eval-only", "--output", "x"])]


def test_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "COCO-Keypoints/keypoint_rcnn_resnet50_fpn_1x.py"
    assert find_config(f"configs/{name}") == find_config(name) == CONFIGS / name
    # A file of the user comes first.
    own = Path("configs") / name
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config(own) == own
    assert find_config("none.py") == Path("none.py")
    assert list_configs("COCO-Keypoints/*resnet*") == {
        name: "Keypoint R-CNN, ResNet-50, FPN, 1x. No number is published for this recipe."
    }


@pytest.mark.slow
def test_a_wheel_is_complete(tmp_path: Path) -> None:
    """Built, unpacked and used far from the checkout."""
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    # Not in the checkout, where setuptools would leave its files.
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("focalnet_det", "configs", "tools", "datasets"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(wheels), str(source)], check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    installed = {p.relative_to(site / "focalnet_det/configs") for p in site.rglob("configs/**/*.*")}
    assert installed == {p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.*") if p.suffix != ".pyc"}
    entry = next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "focalnet-det = focalnet_det.command_line:main" in entry
    done = subprocess.run(
        [
            *(sys.executable, "-m", "focalnet_det", "analyze", "--json", "--config-file"),
            "configs/COCO-Detection/retinanet_focalnet_nano_fpn_small.py",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert '"components"' in done.stdout
    assert not (source / "output").exists()
