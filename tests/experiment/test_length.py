"""Length, milestones, warm-up, detections, flips: what follows from an override, by hand."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T

from focalnet_det.experiment import Experiment, RunArguments, check, describe
from focalnet_det.experiment.length import shorten_warmup
from focalnet_det.experiment.settings import Given
from focalnet_det.experiment.skeleton import build_without_memory
from focalnet_det.experiment.solver import Schedule
from focalnet_det.experiment.yacs_parts import train_arguments
from tests.helpers.refused import (
    BOXES,
    CONFIGS,
    NANO,
    ONE_X,
    PANOPTIC,
    RETINANET_YAML,
    UPERNET,
    UPERNET_YAML,
    YAML,
    data_of,
)

CASCADE = "COCO-InstanceSegmentation/cascade_mask_rcnn_focalnet_tiny_lrf_fpn_3x.py"


def described(config: str, *opts: str) -> Experiment:
    return describe(RunArguments(config_file=str(CONFIGS / config), opts=list(opts)))


@pytest.mark.parametrize(
    ("config", "opts", "length", "milestones"),
    [
        # Twelve epochs with drops after 9 and 11: three quarters, and eleven twelfths.
        (ONE_X, ["schedule.iterations=1200"], (None, 1200), (900, 1100)),
        (ONE_X, ["schedule.iterations=1200", "schedule.epochs=null"], (None, 1200), (900, 1100)),
        (ONE_X, ["schedule.epochs=24"], (24, None), (18, 22)),
        (ONE_X, ["schedule.epochs=3"], (3, None), (2.25, 2.75)),
        (ONE_X, ["schedule.iterations=90", "schedule.milestones=[60]"], (None, 90), (60,)),
        (YAML, ["SOLVER.MAX_ITER=1200"], (None, 1200), (900, 1100)),
        (YAML, ["SOLVER.EPOCHS", "0", "SOLVER.MAX_ITER", "1200"], (None, 1200), (900, 1100)),
        (YAML, ["SOLVER.EPOCHS=24"], (24, None), (18, 22)),
        (YAML, ["SOLVER.MAX_ITER=90", "SOLVER.STEPS=(60,)"], (None, 90), (60,)),
        (NANO, ["schedule.iterations=60"], (None, 60), ()),
        (NANO, ["schedule.epochs=2"], (2, None), ()),
        (UPERNET_YAML, ["SOLVER.MAX_ITER=90"], (None, 90), ()),
        (ONE_X, [], (12, None), (9, 11)),
        (YAML, [], (12, None), (9, 11)),
    ],
)
def test_milestones_follow_the_length(
    config: str,
    opts: list[str],
    length: tuple[float | None, int | None],
    milestones: tuple[float, ...],
) -> None:
    schedule = described(config, *opts).schedule
    assert (schedule.epochs, schedule.iterations) == length
    assert schedule.milestones == milestones


@pytest.mark.parametrize(
    ("iterations", "warmup", "given", "expected"),
    [
        (60, 100, (), 6),  # nothing would be trained at the rate of the recipe
        (199, 100, (), 19),
        (200, 100, (), 100),
        (87_960, 500, (), 500),
        (4, 500, (), 0),
        (200, 150, ("warmup",), 150),
    ],
)
def test_warm_up_leaves_something_to_train(
    iterations: int,
    warmup: int,
    given: tuple[str, ...],
    expected: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedule = Schedule(iterations=iterations, decay="cosine", warmup_iterations=warmup)
    settled = shorten_warmup(schedule, 5, Given(frozenset(given)))
    assert settled.warmup_iterations == expected
    assert ("is shortened to" in caplog.text) == (expected != warmup)


def test_the_example_of_the_readme_trains(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    """60 iterations of a recipe that warms up for 100."""
    caplog.set_level(logging.INFO, "focalnet_det")
    opts = ["schedule.iterations=60"]
    args = RunArguments(config_file=str(CONFIGS / NANO), opts=opts, **data_of(NANO, files))
    args.output = str(files / "run")
    experiment = check(describe(args))
    course = experiment.schedule.multiplier(1)
    rates = [course(i / 60) for i in range(60)]
    assert max(rates) > 0.9
    assert "warm-up of 100 iterations is shortened to 6" in caplog.text
    assert "warmup_iterations: 6" in experiment.config_text


@pytest.mark.parametrize(
    ("config", "override", "kept"),
    [
        (ONE_X, "train.max_dets=150", 100),
        (CASCADE, "train.max_dets=150", 100),
        (BOXES, "train.max_dets=150", 100),
        (YAML, "TEST.MAX_DETS=150", 100),
        (RETINANET_YAML, "TEST.MAX_DETS=150", 100),
    ],
)
def test_a_model_gives_as_many_detections_as_are_scored(
    config: str, override: str, kept: int
) -> None:
    def limit(experiment: Experiment) -> set[int]:
        model, _ = experiment.skeleton()
        names = ("test_topk_per_image", "max_detections_per_image")
        return {getattr(m, n) for m in model.modules() for n in names if hasattr(m, n)}

    assert limit(described(config)) == {kept}
    assert limit(described(config, override)) == {150}


def test_a_limit_that_was_given_stays() -> None:
    limit = "model.roi_heads.box_predictor.test_topk_per_image=50"
    experiment = described(ONE_X, limit, "train.max_dets=150")
    assert experiment.settings.model.detections == 50


@pytest.mark.parametrize(
    ("flip", "expected"),
    [("horizontal", [(True, False)]), ("vertical", [(False, True)]), ("none", [])],
)
def test_flips_of_a_yaml_config(flip: str, expected: list[tuple[bool, bool]]) -> None:
    from focalnet_det.experiment import load_config

    cfg = load_config(CONFIGS / YAML, [f"INPUT.RANDOM_FLIP={flip}", "INPUT.POLICY=resize"])
    found = train_arguments(cfg)["augmentations"]
    flips = [(a.horizontal, a.vertical) for a in found if isinstance(a, T.RandomFlip)]
    assert flips == expected


def test_backbone_multiplier_acts_on_networks_without_a_neck() -> None:
    experiment = described(UPERNET_YAML, "SOLVER.BACKBONE_MULTIPLIER=0.1")
    model, _ = experiment.skeleton()
    by_id = {id(p): n for n, p in model.named_parameters()}
    groups = experiment.optimizer(model).param_groups
    rates = {by_id[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates["backbone.norm1.weight"] == pytest.approx(6e-6)
    assert rates["sem_seg_head.bottleneck.conv.weight"] == pytest.approx(6e-5)


@pytest.mark.parametrize("config", [NANO, YAML, UPERNET, UPERNET_YAML, PANOPTIC])
def test_the_text_of_a_config_is_read_back(config: str, files: Path, tmp_path: Path) -> None:
    args = RunArguments(config_file=str(CONFIGS / config), **data_of(config, files))
    experiment = describe(args)
    (tmp_path / "config.yaml").write_text(experiment.config_text)
    again = describe(RunArguments(config_file=str(tmp_path / "config.yaml")))
    assert again.settings == experiment.settings
    assert again.config_text == experiment.config_text
    model, problems = again.skeleton()
    assert problems == []
    shapes = {name: p.shape for name, p in experiment.skeleton()[0].named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_models_that_read_their_tensors_are_built_for_the_checks_too() -> None:
    built = []

    def build(device: str) -> float:
        built.append(device)
        return torch.ones(3).sum().item()

    assert build_without_memory(build) == 3
    assert built == ["meta", "cpu"]
    assert build_without_memory(lambda _: torch.ones(3)).device.type == "meta"
    with pytest.raises(RuntimeError, match="negative dimension"):
        build_without_memory(lambda _: torch.ones(-3))


def test_callables_are_saved_by_name() -> None:
    from detectron2.config import LazyCall
    from omegaconf import OmegaConf
    from torch import nn

    from focalnet_det.experiment.lazy import config_text

    call = LazyCall(SimpleNamespace)(act=nn.GELU)
    cfg = OmegaConf.create({"a": call}, flags={"allow_objects": True})
    saved = OmegaConf.create(config_text(cfg))
    assert instantiate(saved.a).act is nn.GELU
