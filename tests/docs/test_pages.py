"""The README keeps its word: its Python runs, its yaml works, its commands name what exists."""

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [README, (ROOT / "datasets/README.md").read_text()]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```(?:{language})\n(.*?)```", page, re.S)


def commands() -> list[str]:
    text = "\n".join(block for page in PAGES for block in blocks("bash|sh", page))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def test_plain_pytorch_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in blocks("python") if "create_backbone" in block)
    scope: dict = {}
    exec(code, scope)
    assert scope["features"]["stage2"].shape == (1, 192, 60, 80)
    assert "'stage4': (768, 32)" in capsys.readouterr().out


def test_detectron2_lines_build_a_model() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    from yaml import safe_load

    scope: dict = {}
    exec(next(block for block in blocks("python") if "get_cfg" in block), scope)
    # After our package, without which main's model zoo may not import.
    from detectron2.model_zoo import model_zoo
    from detectron2.modeling import build_model

    cfg = scope["cfg"]
    zoo = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_file(zoo)
    cfg.merge_from_other_cfg(type(cfg)(safe_load(blocks("yaml")[0])))
    cfg.MODEL.DEVICE = "cpu"
    names = dict(build_model(cfg).named_parameters())
    assert names["backbone.bottom_up.layers.3.blocks.1.mlp.fc2.weight"].shape == (768, 3072)


def test_commands_are_the_makefile_and_our_tools() -> None:
    assert {"make demo", "make test"} <= set(commands())


@cache
def help_text(script: str) -> str:
    """What ``--help`` prints."""
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", [c for c in commands() if ".py" in c])
def test_command_is_understood(command: str) -> None:
    """Each script exists and takes the options shown; each config exists."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    shown = help_text(script)
    for word in words[words.index(script) + 1 :]:
        if word.startswith("--"):
            assert word in shown, f"{script} has no option {word}"
        elif word.startswith("configs/"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
