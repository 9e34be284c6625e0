"""Optimizer parameter groups and learning-rate schedules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn


def parameter_groups(
    model: nn.Module, *, weight_decay: float, no_decay_names: Sequence[str] = ("norm",)
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay, and exempt from it by name.

    Args:
        model: any module.
        weight_decay: of the first group.
        no_decay_names: a parameter with one of these in its full name is exempt. The published
            recipes exempt ``norm`` alone, so biases and layer scales are decayed.
    Source: microsoft/FocalNet:detection/configs (paramwise_cfg), as mmdet 2.11 reads it.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = any(part in name for part in no_decay_names)
            (exempt if is_exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.05,
    no_decay_names: Sequence[str] = ("norm",),
) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`."""
    groups = parameter_groups(model, weight_decay=weight_decay, no_decay_names=no_decay_names)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a training and the course of its learning rate, before the data set is known.

    Attributes:
        epochs: length in passes over the training set; or
        iterations: length in iterations. Exactly one of the two is given.
        decay: "multistep" or "cosine" (to zero).
        milestones: of "multistep", in the unit of the length.
        gamma: factor at each milestone.
        warmup_iterations, warmup_factor: linear warmup from that factor of the rate.
    Raises: ValueError if the fields contradict each other.
    """

    epochs: float | None = None
    iterations: int | None = None
    decay: str = "multistep"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup_iterations: int = 500
    warmup_factor: float = 0.001

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(
                "A schedule needs either epochs or iterations (set the other to None)."
            )
        if self.length <= 0:
            raise ValueError(f"A schedule must be longer than {self.length}.")
        if self.decay not in ("multistep", "cosine"):
            raise ValueError(f"Unknown decay {self.decay!r}. Known: cosine, multistep.")

    @property
    def length(self) -> float:
        """In epochs or iterations, whichever was given."""
        length = self.epochs if self.iterations is None else self.iterations
        assert length is not None
        return length

    def max_iter(self, iterations_per_epoch: int) -> int:
        """Length in iterations."""
        return self._to_iterations(self.length, iterations_per_epoch)

    def multiplier(self, iterations_per_epoch: int) -> ParamScheduler:
        """Learning-rate factor over the whole training, for Detectron2's ``LRMultiplier``."""
        total = self.max_iter(iterations_per_epoch)
        if self.decay == "cosine":
            course: ParamScheduler = CosineParamScheduler(1.0, 0.0)
        else:
            steps = [self._to_iterations(m, iterations_per_epoch) for m in self.milestones]
            # A shortened training may end before a milestone.
            steps = [step for step in steps if step < total]
            values = [self.gamma**i for i in range(len(steps) + 1)]
            course = MultiStepParamScheduler(values, milestones=steps, num_updates=total)
        if self.warmup_iterations == 0:
            return course
        warmup = min(self.warmup_iterations / total, 1.0)
        return WarmupParamScheduler(course, self.warmup_factor, warmup, "linear")

    def _to_iterations(self, length: float, iterations_per_epoch: int) -> int:
        unit = iterations_per_epoch if self.iterations is None else 1
        return max(1, round(length * unit))
