"""Optimizer parameter groups and learning-rate schedules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    PolynomialDecayParamScheduler,
)
from torch import nn

from ..backbones.stages import Stage, StagedBackbone


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay_names: Sequence[str] = ("norm",),
    lr_factors: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay.

    Args:
        model: any module.
        lr, weight_decay: of parameters that no rule names.
        no_decay_names: a parameter with one of these in its full name is exempt from decay. The
            published recipes exempt ``norm`` alone, so biases and layer scales are decayed.
        lr_factors: {part of a name: factor}; the first that occurs in a parameter's full name
            multiplies its rate.
        layer_decay: factor on the rates of a focal network, per layer of :func:`layers_above`.
    Source: microsoft/FocalNet:detection/configs (paramwise_cfg), as mmdet 2.11 reads it.
    """
    above = {
        f"{prefix}.{name}".lstrip("."): count
        for prefix, module in model.named_modules()
        if isinstance(module, StagedBackbone)
        for name, count in layers_above(module).items()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((f for part, f in (lr_factors or {}).items() if part in name), 1.0)
            factor *= layer_decay ** above.get(name, 0)
            decay = 0.0 if any(part in name for part in no_decay_names) else weight_decay
            groups.setdefault((lr * factor, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda g: g[0], reverse=True)
    ]


def layers_above(network: StagedBackbone) -> dict[str, int]:
    """Count the layers of a focal network that a gradient passes on its way to each parameter.

    The last block and the output norms have 1; a downsampling counts with the block that follows
    it; the stem has one more than the first block.

    Source: arXiv:2003.10555, section 3.2 (layer-wise decay), as arXiv:2106.08254 has it for images.
    """
    depths = [len(cast(Stage, stage).blocks) for stage in network.layers]

    def above(name: str) -> int:
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return sum(depths) + 1
        if parts[0] != "layers":
            return 1
        stage = int(parts[1])
        block = int(parts[3]) if parts[2] == "blocks" else depths[stage]
        return sum(depths) - sum(depths[:stage]) - block

    return {name: above(name) for name, _ in network.named_parameters()}


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.05,
    no_decay_names: Sequence[str] = ("norm",),
    lr_factors: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Return AdamW over :func:`parameter_groups`."""
    groups = parameter_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        no_decay_names=no_decay_names,
        lr_factors=lr_factors,
        layer_decay=layer_decay,
    )
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a training and the course of its learning rate, before the data set is known.

    Attributes:
        epochs: length in passes over the training set; or
        iterations: length in iterations. Exactly one of the two is given.
        decay: "multistep"; "cosine" (to zero); or "poly" (to zero).
        milestones: of "multistep", in the unit of the length.
        gamma: factor at each milestone.
        power: of "poly"; 1 is linear.
        warmup_iterations, warmup_factor: linear warmup from that factor of the rate.
    Raises: ValueError if the fields contradict each other.
    """

    epochs: float | None = None
    iterations: int | None = None
    decay: str = "multistep"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    power: float = 1.0
    warmup_iterations: int = 500
    warmup_factor: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(
                "A schedule needs either epochs or iterations (set the other to None)."
            )
        if self.length <= 0:
            raise ValueError(f"A schedule must be longer than {self.length}.")
        if self.decay not in ("multistep", "cosine", "poly"):
            raise ValueError(f"Unknown decay {self.decay!r}. Known: cosine, multistep, poly.")

    @property
    def length(self) -> float:
        """Return the length in epochs or iterations, whichever was given."""
        length = self.epochs if self.iterations is None else self.iterations
        assert length is not None
        return length

    def max_iter(self, iterations_per_epoch: int) -> int:
        """Return the length in iterations."""
        return self._to_iterations(self.length, iterations_per_epoch)

    def multiplier(self, iterations_per_epoch: int) -> ParamScheduler:
        """Return the learning-rate factor over the training, for Detectron2's ``LRMultiplier``."""
        total = self.max_iter(iterations_per_epoch)
        if self.decay == "cosine":
            course: ParamScheduler = CosineParamScheduler(1.0, 0.0)
        elif self.decay == "poly":
            course = PolynomialDecayParamScheduler(1.0, self.power)
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
