"""The configs of the repository, read, and models of them that take no memory."""

import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.config import CfgNode, instantiate
from torch import nn

from focalnet_det.data import loader as data_build
from focalnet_det.experiment import (
    Experiment,
    load_config,
    read_experiment,
)
from focalnet_det.experiment import yacs_parts as yacs_module
from tests.helpers.paths import CONFIGS, ROOT

LEAVES = sorted(p for p in CONFIGS.glob("*/*.py") if p.parent.name != "common")

YAMLS = sorted(CONFIGS.glob("*/*.yaml"))

RECIPE = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py"


def names(paths: list[Path]) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in paths]


@cache
def zoo_rows() -> dict[str, tuple[str, ...]]:
    """Cells of the tables of docs/zoo.md, by the path of the config below ``configs``."""
    rows = {}
    for line in (ROOT / "docs/zoo.md").read_text().splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if found := re.search(r"\(\.\./configs/(.+)\)", cells[0]):
            rows[found[1]] = cells
    return rows


def read(path: Path) -> Experiment:
    return read_experiment(load_config(path, []))


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """A model of any size in no time: its tensors have shapes, but no values."""
    with torch.device("meta"), mock.patch.object(nn.Module, "to", lambda self, *_, **__: self):
        return build()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def train_loader_arguments(path: Path) -> dict[str, Any]:
    """What the training loader is built with, defaults included; the data need not be there."""
    signature = inspect.signature(data_build.build_train_loader)
    cfg = load_config(path, [])
    if isinstance(cfg, CfgNode):
        # An experiment builds its loader once.
        with mock.patch.object(yacs_module, "build_loader") as build:
            read(path).train_loader()
        given = build.call_args.kwargs
    else:
        node = cfg.dataloader.train
        given = {key: instantiate(node[key]) for key in node if key != "_target_"}
    arguments = signature.bind(**given)
    arguments.apply_defaults()
    result = dict(arguments.arguments)
    datasets = result["datasets"]
    result["datasets"] = [datasets] if isinstance(datasets, str) else list(datasets)
    result["augmentations"] = [repr(augmentation) for augmentation in result["augmentations"]]
    return result
