"""Every config builds, twins agree, and the zoo is the published one."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from torch import nn

from focalnet_det.experiment import (
    Experiment,
    RunArguments,
    describe,
    load_config,
    read_experiment,
)
from focalnet_det.experiment.check import (
    batch_problems,
    class_problems,
    feature_problems,
    name_problems,
    skeleton,
)
from tests.helpers.configs import (
    LEAVES,
    RECIPE,
    YAMLS,
    build_without_memory,
    names,
    read,
    shapes,
    train_loader_arguments,
    zoo_rows,
)


def test_there_are_configs() -> None:
    assert RECIPE in LEAVES
    assert RECIPE.with_suffix(".yaml") in YAMLS


@pytest.mark.parametrize("path", LEAVES + YAMLS, ids=names(LEAVES + YAMLS))
def test_config_builds(path: Path) -> None:
    experiment = describe(RunArguments(config_file=str(path)))
    model, problems = skeleton(experiment)
    problems += [*class_problems(experiment.settings, model), *name_problems(experiment, model)]
    assert problems + feature_problems(model) + batch_problems(experiment) == []
    if path in LEAVES:
        # If not: focalnet-det configs --zoo-page docs/zoo.md.
        cells = zoo_rows()[f"{path.parent.name}/{path.name}"]
        assert cells[2] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    optimizer = experiment.optimizer(model)
    in_groups = sum(len(group["params"]) for group in optimizer.param_groups)
    assert in_groups == sum(p.requires_grad for p in model.parameters())
    assert experiment.schedule.max_iter(100) > 0
    assert 0 < experiment.schedule.multiplier(100)(0.5) <= 1
    arguments = train_loader_arguments(path)
    assert len(arguments["datasets"]) == 1
    assert arguments["batch_size"] > 0
    assert list(experiment.test_loaders)
    assert not set(experiment.test_loaders) & set(arguments["datasets"])


@pytest.mark.parametrize("path", LEAVES, ids=names(LEAVES))
def test_leaf_is_a_sentence(path: Path) -> None:
    source = path.read_text()
    docstring = ast.parse(source).body[0]
    assert isinstance(docstring, ast.Expr), "a config begins with what it trains"
    code = [line for line in source.splitlines()[docstring.end_lineno :] if line.strip()]
    assert len(code) <= 15


@pytest.mark.parametrize("path", YAMLS, ids=names(YAMLS))
def test_yaml_equals_its_twin(path: Path) -> None:
    twin = path.with_suffix(".py")
    assert twin.is_file(), "every .yaml has a .py of the same stem"
    yacs, lazy = read(path), read(twin)
    models = [build_without_memory(experiment.model) for experiment in (yacs, lazy)]
    assert shapes(models[0]) == shapes(models[1])
    for name in ("pixel_mean", "pixel_std"):
        assert getattr(models[0], name).shape == getattr(models[1], name).shape
    assert models[0].input_format == models[1].input_format
    assert yacs.schedule == lazy.schedule
    assert groups(yacs, models[0]) == groups(lazy, models[1])
    assert list(yacs.test_loaders) == list(lazy.test_loaders)
    assert train_loader_arguments(path) == train_loader_arguments(twin)
    # Detectron2 has "./output" where we have "output".
    options = [{**vars(e.options), "output_dir": ""} for e in (yacs, lazy)]
    assert options[0] == options[1]


def groups(experiment: Experiment, model: nn.Module) -> list[tuple[Any, ...]]:
    optimizer = experiment.optimizer(model)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (
            type(optimizer).__name__,
            group["lr"],
            group["weight_decay"],
            group.get("betas"),
            [by_id[id(parameter)] for parameter in group["params"]],
        )
        for group in optimizer.param_groups
    ]


# The published Mask R-CNN zoo: parameters in the official layout, in millions; stochastic depth of
# the last block; kernels per level. Source: microsoft/FocalNet:detection/configs/focalnet.
ZOO = {
    "focalnet_tiny_srf_fpn_1x": ("48.675", 0.1, (9, 11)),
    "focalnet_tiny_srf_fpn_3x": ("48.675", 0.3, (9, 11)),
    "focalnet_tiny_lrf_fpn_1x": ("49.426", 0.1, (9, 11, 13)),
    "focalnet_tiny_lrf_fpn_3x": ("49.426", 0.3, (9, 11, 13)),
    "focalnet_small_srf_fpn_1x": ("70.913", 0.2, (9, 11)),
    "focalnet_small_srf_fpn_3x": ("70.913", 0.5, (9, 11)),
    "focalnet_small_lrf_fpn_1x": ("72.448", 0.2, (9, 11, 13)),
    "focalnet_small_lrf_fpn_3x": ("72.448", 0.5, (9, 11, 13)),
    "focalnet_base_srf_fpn_1x": ("109.543", 0.3, (9, 11)),
    "focalnet_base_srf_fpn_3x": ("109.543", 0.5, (9, 11)),
    "focalnet_base_lrf_fpn_1x": ("111.589", 0.3, (9, 11, 13)),
    "focalnet_base_lrf_fpn_3x": ("111.589", 0.5, (9, 11, 13)),
    "focalnet_tiny_deeper_fpn_1x": ("46.013", 0.2, (9, 11, 13)),
    "focalnet_small_deeper_fpn_1x": ("60.307", 0.2, (9, 11, 13)),
    "focalnet_base_deeper_fpn_1x": ("107.713", 0.3, (9, 11, 13)),
}

SCHEDULES = {"1x": (12, (9, 11)), "3x": (36, (27, 33))}


def test_zoo_is_complete() -> None:
    found = {p.stem for p in LEAVES if re.search("^mask_rcnn_focalnet.*_[0-9]+x$", p.stem)}
    assert found == {f"mask_rcnn_{name}" for name in ZOO}


def zoo_overrides(name: str) -> list[str]:
    """What turns the one yaml of Mask R-CNN into another row of the zoo."""
    variant, _, schedule = name.rpartition("_fpn_")
    overrides = [f"MODEL.FOCALNET.VARIANT={variant}", f"SOLVER.EPOCHS={SCHEDULES[schedule][0]}"]
    return [*overrides, f"MODEL.FOCALNET.DROP_PATH_RATE={ZOO[name][1]}"]


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
@pytest.mark.parametrize("name", ZOO)
def test_zoo_leaf_is_as_published(name: str, suffix: str) -> None:
    millions, drop_path, kernels = ZOO[name]
    path, overrides = RECIPE.with_name(f"mask_rcnn_{name}.py"), []
    if suffix == ".yaml":
        path, overrides = RECIPE.with_suffix(".yaml"), zoo_overrides(name)
    recipe, reference = read_experiment(load_config(path, overrides)), read(RECIPE)
    model = build_without_memory(recipe.model)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == millions
    backbone = model.backbone.bottom_up
    assert str(type(backbone).__name__) == "FocalNetBackbone"
    blocks = [block for layer in backbone.layers for block in layer.blocks]
    rates = [drop_path * i / (len(blocks) - 1) for i in range(len(blocks))]
    assert [block.drop_path.rate for block in blocks] == pytest.approx(rates)
    for block in blocks:
        found = tuple(level[0].kernel_size[0] for level in block.modulation.focal_layers)
        assert found == kernels
    epochs, milestones = SCHEDULES[name[-2:]]
    assert (recipe.schedule.epochs, tuple(recipe.schedule.milestones)) == (epochs, milestones)
    assert recipe.schedule.warmup_iterations == 500
    for rate, decay, exempt in [group_summary(g, model) for g in optimizer_groups(recipe, model)]:
        assert rate == 1e-4
        assert decay == (0.0 if exempt else 0.05)
    assert train_loader_arguments(path) == train_loader_arguments(RECIPE)
    assert recipe.options.recipe_batch == 16
    for option in ("precision", "clip_norm", "max_dets", "seed", "init_checkpoint"):
        assert getattr(recipe.options, option) == getattr(reference.options, option), option


def optimizer_groups(experiment: Experiment, model: nn.Module) -> list[dict[str, Any]]:
    return list(experiment.optimizer(model).param_groups)


def group_summary(group: dict[str, Any], model: nn.Module) -> tuple[float, float, bool]:
    """Rate, decay, and whether the group holds exactly the parameters with norm in their name."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt = {"norm" in by_id[id(parameter)] for parameter in group["params"]}
    assert len(exempt) == 1
    return group["lr"], group["weight_decay"], exempt.pop()
