"""Parameter groups and schedules, with multipliers worked out by hand."""

import math

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from torch import nn

from focalnet_det import create_backbone
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.experiment.solver import Schedule, adamw, parameter_groups
from focalnet_det.necks.fpn import build_fpn


def names_of_groups(model: nn.Module, **options: object) -> tuple[set[str], set[str]]:
    """Names in the group with weight decay, and in the group without."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.05, **options)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, exempt = ([names[id(p)] for p in group["params"]] for group in groups)
    assert len(decayed) == len(set(decayed))
    assert len(exempt) == len(set(exempt))
    return set(decayed), set(exempt)


def test_only_norms_are_exempt_from_decay() -> None:
    # The large models have all that may be mistaken: layer scales and a norm called `ln`.
    net = create_backbone("focalnet_huge_fl3", embed_dim=8, depths=(1, 1, 1, 1))
    decayed, exempt = names_of_groups(net)
    assert decayed | exempt == {name for name, _ in net.named_parameters()}
    assert not decayed & exempt
    assert {
        "layers.0.blocks.0.gamma_1",
        "layers.0.blocks.0.gamma_2",
        "layers.0.blocks.0.modulation.ln.weight",
        "layers.0.blocks.0.modulation.f.bias",
        "layers.0.blocks.0.mlp.fc1.bias",
        "patch_embed.proj.bias",
        "layers.2.downsample.proj.weight",
    } <= decayed
    # Two norms in each of 4 blocks, stem, 3 downsamplings, 4 outputs: weight and bias each.
    assert len(exempt) == 2 * (2 * 4 + 1 + 3 + 4)
    assert {"layers.3.blocks.0.norm2.bias", "patch_embed.norm.weight", "norm0.bias"} <= exempt
    assert "layers.1.downsample.norm.weight" in exempt


def test_exempt_names_apply_to_the_whole_detector() -> None:
    neck = build_fpn(focalnet_backbone("focalnet_nano", embed_dim=8), out_channels=32, norm="GN")
    decayed, exempt = names_of_groups(neck, no_decay_names=("norm", "bias"))
    assert {"fpn_lateral2.norm.weight", "bottom_up.patch_embed.proj.bias"} <= exempt
    assert "fpn_lateral2.weight" in decayed


def test_frozen_parameters_are_in_no_group() -> None:
    net = create_backbone("focalnet_nano", embed_dim=8, frozen_stages=1)
    decayed, exempt = names_of_groups(net)
    assert not any(n.startswith(("patch_embed.", "layers.0.")) for n in decayed | exempt)
    assert "layers.1.blocks.0.modulation.f.weight" in decayed


def test_adamw_decays_what_it_should() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(1, 1), "norm": nn.LayerNorm(1)})
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model, lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    optimizer.step()
    # Without gradient, AdamW multiplies by 1 - lr * decay = 0.95.
    assert model["fc"].weight.item() == pytest.approx(1.9)
    assert model["fc"].bias.item() == pytest.approx(1.9)
    assert model["norm"].weight.item() == 2.0
    assert model["norm"].bias.item() == 2.0
    assert all(
        group["betas"] == (0.8, 0.9) and group["lr"] == 0.1 for group in optimizer.param_groups
    )


def multipliers(schedule: Schedule, per_epoch: int, iterations: list[int]) -> list[float]:
    course, total = schedule.multiplier(per_epoch), schedule.max_iter(per_epoch)
    return [course(iteration / total) for iteration in iterations]


def test_multistep_in_epochs() -> None:
    schedule = Schedule(
        epochs=3, milestones=(1, 2), gamma=0.5, warmup_iterations=4, warmup_factor=0.2
    )
    assert schedule.max_iter(10) == 30
    iterations = [0, 1, 2, 3, 4, 9, 10, 19, 20, 29]
    expected = [0.2, 0.4, 0.6, 0.8, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert multipliers(schedule, 10, iterations) == pytest.approx(expected)


def test_multistep_in_iterations_does_not_depend_on_the_data_set() -> None:
    schedule = Schedule(iterations=90_000, milestones=(60_000, 80_000), warmup_iterations=1000)
    for per_epoch in (1, 7330):
        assert schedule.max_iter(per_epoch) == 90_000
        values = multipliers(schedule, per_epoch, [59_999, 60_000, 79_999, 80_000])
        assert values == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("per_epoch", [7, 93, 7330, 7393])
def test_milestones_fall_on_the_exact_iteration(per_epoch: int) -> None:
    schedule = Schedule(epochs=12, milestones=(9, 11), warmup_iterations=0)
    first, second = 9 * per_epoch, 11 * per_epoch
    values = multipliers(schedule, per_epoch, [first - 1, first, second - 1, second])
    assert values == pytest.approx([1, 0.1, 0.1, 0.01])


def test_poly_as_published_for_ade20k() -> None:
    schedule = Schedule(
        iterations=160_000, decay="poly", warmup_iterations=1500, warmup_factor=1e-6
    )
    course = schedule.multiplier(1)
    end_of_warmup = 1 - 1500 / 160_000
    expected = {
        0: 1e-6,
        750: (1e-6 + end_of_warmup) / 2,
        1500: end_of_warmup,
        80_000: 0.5,
        159_999: 1 / 160_000,
    }
    actual = {iteration: course(iteration / 160_000) for iteration in expected}
    assert actual == pytest.approx(expected, rel=1e-6)


def test_cosine() -> None:
    schedule = Schedule(iterations=700, decay="cosine", warmup_iterations=100)
    at_100 = (1 + math.cos(math.pi / 7)) / 2
    expected = [0.001, (0.001 + at_100) / 2, at_100, 0.5, (1 + math.cos(math.pi * 6 / 7)) / 2]
    assert multipliers(schedule, 5, [0, 50, 100, 350, 600]) == pytest.approx(expected)


def test_without_warmup() -> None:
    schedule = Schedule(iterations=10, milestones=(5,), warmup_iterations=0)
    assert multipliers(schedule, 1, [0, 4, 5]) == pytest.approx([1, 1, 0.1])


def test_shortened_training_ends_before_its_milestones() -> None:
    schedule = Schedule(iterations=100, milestones=(60, 100, 200), warmup_iterations=10)
    assert multipliers(schedule, 1, [59, 60, 99]) == pytest.approx([1, 0.1, 0.1])


def test_training_shorter_than_its_warmup() -> None:
    schedule = Schedule(iterations=10, warmup_iterations=500, warmup_factor=0.001)
    values = multipliers(schedule, 1, list(range(10)))
    assert values[0] == pytest.approx(0.001)
    assert values == sorted(values)
    assert values[-1] <= 1


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "expected"),
    [(0.5, 10, 5), (0.01, 10, 1), (1.5, 7, 10), (12, 7330, 87_960)],
)
def test_length_in_iterations(epochs: float, per_epoch: int, expected: int) -> None:
    assert Schedule(epochs=epochs).max_iter(per_epoch) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either epochs or iterations"),
        ({"epochs": 12, "iterations": 100}, "either epochs or iterations"),
        ({"epochs": 0}, "must be positive, got 0"),
        ({"iterations": -5}, "must be positive, got -5"),
        ({"epochs": 1, "decay": "step"}, "'step'.*cosine, multistep, poly"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_lr_factors_multiply_the_rate_of_named_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    groups = parameter_groups(model, lr=0.5, weight_decay=0.1, lr_factors={"a.w": 0.1, "a": 0.2})
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found[id(model["a"].weight)] == pytest.approx((0.05, 0.1))
    assert found[id(model["a"].bias)] == pytest.approx((0.1, 0.1))
    assert found[id(model["norm"].weight)] == (0.5, 0.0)
