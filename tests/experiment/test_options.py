"""Configs end in one folder; the options of a run are listed once."""

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import get_cfg

from focalnet_det import add_focalnet_config
from focalnet_det.experiment import TrainOptions
from focalnet_det.experiment.options import default_options, option_table, yacs_key
from focalnet_det.experiment.yacs import read_options
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "focalnet_det"
NAMES = {"CfgNode", "get_cfg", "LazyConfig", "instantiate", "OmegaConf", "DictConfig", "ListConfig"}
# Detectron2 hands its config to what it builds by name: `from_config`, and registered builders.
ALLOWED = {
    "detectron2/backbone.py": "registered backbones",
    "heads/mmdet/conventions.py": "from_config",
    "heads/mmdet/segmentor.py": "from_config",
    "heads/atss/atss.py": "from_config",
    "heads/dino/dino_model.py": "from_config",
    "heads/mask2former/mask2former.py": "from_config",
    "heads/reppoints_v2/reppoints_v2.py": "from_config",
    "heads/sparse_rcnn/sparse_rcnn.py": "from_config",
    "heads/upernet.py": "from_config",
    "engine/own_project.py": "changes the config of somebody else's Detectron2 project",
    "benchmark/recipe_models.py": "builds the model of a recipe alone, for measurements",
    "benchmark/detector_speed.py": "changes a recipe for measurements",
}


def config_names(path: Path) -> set[str]:
    """What a module imports of yacs, OmegaConf and Detectron2's configs."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} & NAMES
            found |= {node.module} & {"yacs.config", "omegaconf", "detectron2.config"}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] in ("yacs", "omegaconf")}
    return found


def test_configs_are_read_in_one_folder() -> None:
    outside = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "experiment" not in path.relative_to(PACKAGE).parts and config_names(path)
    }
    assert outside <= set(ALLOWED), f"reads configs: {sorted(outside - set(ALLOWED))}"


def test_every_option_is_documented() -> None:
    listed = re.findall(r"^        ([a-z_, ]+): ", TrainOptions.__doc__ or "", re.M)
    names = {name for names in listed for name in names.split(", ")}
    assert names == set(default_options())


def test_every_option_has_a_key_in_yaml() -> None:
    cfg = get_cfg()
    add_focalnet_config(cfg)
    for option, value in default_options().items():
        node = cfg
        for part in yacs_key(option).split("."):
            assert part in node, option
            node = node[part]
        assert isinstance(node, type(value)) or isinstance(value, float | dict), option


def test_the_table_of_options_is_up_to_date() -> None:
    """It is made by ``option_table``: put its text into the page when an option changes."""
    assert option_table() in (ROOT / "docs/configs.md").read_text()


@pytest.mark.parametrize(
    ("key", "value", "option", "expected"),
    [
        ("SOLVER.PROFILE", (2, 4), "profile", (2, 4)),
        ("SOLVER.WANDB_PROJECT", "mine", "wandb_project", "mine"),
        ("TEST.SAVE_PREDICTIONS", True, "save_predictions", True),
        ("SOLVER.DDP", {"static_graph": True}, "ddp", {"static_graph": True}),
        ("SOLVER.PERIOD_UNIT", "epochs", "period_unit", "epochs"),
    ],
)
def test_options_that_had_no_key(key: str, value: object, option: str, expected: object) -> None:
    cfg = get_cfg()
    add_focalnet_config(cfg)
    section, name = key.split(".")
    if isinstance(value, dict):
        cfg[section][name].update(value)
    else:
        cfg[section][name] = value
    assert getattr(read_options(cfg), option) == expected
