"""The README and the pages keep their word: Python runs, yaml works, links lead somewhere."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import run_program

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / "datasets/README.md", ROOT / "examples/README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [README, *DOCS, *OTHERS]
MOST_WORDS = 700


def blocks(language: str, page: Path) -> list[str]:
    text = re.sub(r"^  +```", "```", page.read_text(), flags=re.M)
    return re.findall(rf"```(?:{language})\n(.*?)```", text, re.S)


def commands(*pages: Path) -> list[str]:
    """Return the commands of pages, each in one line."""
    text = "\n".join(block for page in pages for block in blocks("bash|sh", page))
    lines = text.replace("\\\n", " ").splitlines()
    found = [" ".join(line.split(" #")[0].split()) for line in lines]
    return [line for line in dict.fromkeys(found) if line and not line.startswith("#")]


def the_block(language: str, page: str, word: str) -> str:
    return next(block for block in blocks(language, ROOT / page) if word in block)


def test_readme_is_short() -> None:
    assert len(README.read_text().split()) <= MOST_WORDS


def test_plain_pytorch_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(the_block("python", "README.md", "create_backbone"), scope)
    assert scope["features"]["stage2"].shape == (1, 192, 60, 80)
    assert "'stage4': (768, 32)" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["FeatureListBackbone", "torchvision_backbone"])
def test_lines_for_other_libraries_run(word: str) -> None:
    exec(the_block("python", "docs/plug-in.md", word), {})


def test_the_config_of_ones_own_is_the_example() -> None:
    shown = the_block("python", "docs/plug-in.md", "timm_backbone").split()
    example = (ROOT / "examples/mask_rcnn_resnet18_timm.py").read_text()
    assert shown == example.split('"""')[2].split()


def test_detectron2_lines_build_a_model() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    from yaml import safe_load

    scope: dict[str, Any] = {}
    exec(the_block("python", "docs/plug-in.md", "get_cfg"), scope)
    # After our package, without which main's model zoo may not import.
    from detectron2.model_zoo import model_zoo
    from detectron2.modeling import build_model

    cfg = scope["cfg"]
    zoo = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_file(zoo)
    by_function = scope["use_focalnet"](cfg.clone(), "focalnet_tiny_lrf")
    cfg.merge_from_other_cfg(type(cfg)(safe_load(the_block("yaml", "docs/plug-in.md", "MODEL"))))
    assert cfg == by_function
    cfg.MODEL.DEVICE = "cpu"
    names = dict(build_model(cfg).named_parameters())
    assert names["backbone.bottom_up.layers.3.blocks.1.mlp.fc2.weight"].shape == (768, 3072)


@cache
def help_text(script: str) -> str:
    """What ``--help`` prints."""
    done = run_program(ROOT / script, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the script that a command runs, and its arguments."""
    from focalnet_det.command_line import COMMANDS

    if words[0] == "focalnet-det":
        command = COMMANDS[words[1]]
        return command.script, [*command.arguments, *words[2:]]
    number = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[number], words[number + 1 :]


TOOL = re.compile(r"\.py( |$)|^focalnet-det [a-z]")


@pytest.mark.parametrize("command", [c for c in commands(*PAGES) if TOOL.search(c)])
def test_command_is_understood(command: str) -> None:
    """Each script exists and takes the options shown; each config exists."""
    script, arguments = script_of(shlex.split(command))
    assert (ROOT / script).is_file()
    shown = help_text(script) if any(word.startswith("--") for word in arguments) else ""
    for word in arguments:
        if word.startswith("--"):
            assert word in shown, f"{script} has no option {word}"
        elif word.startswith("configs/"):
            assert (ROOT / word).is_file()


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_site_has_every_page() -> None:
    listed = re.findall(r'"([a-z0-9-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(listed) == [page.name for page in DOCS]
    linked = (ROOT / "docs/index.md").read_text()
    assert all(f"({name})" in linked for name in listed if name != "index.md")
