"""Build optimizer parameter groups and learning-rate schedules."""

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
    decay_vectors: bool = True,
) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay.

    Args:
        model: any module.
        lr, weight_decay: defaults for parameters that no rule matches.
        no_decay_names: parameters with one of these in their full name are not decayed. The
            published recipes exempt only ``norm``, so biases and layer scales are decayed.
        lr_factors: {part of a name: factor}; the first part that occurs in a parameter's full name
            multiplies its learning rate.
        layer_decay: factor on the learning rates of a focal network per layer, see
            :func:`layers_above`.
        decay_vectors: False exempts biases, norms and layer scales from decay, as the published
            classification recipes do.
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
            exempt = any(part in name for part in no_decay_names)
            exempt |= parameter.ndim <= 1 and not decay_vectors
            decay = 0.0 if exempt else weight_decay
            groups.setdefault((lr * factor, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda g: g[0], reverse=True)
    ]


def layers_above(network: StagedBackbone) -> dict[str, int]:
    """Count, for each parameter of a focal network, the layers between it and the output.

    The last block and the output norms have 1; a downsampling has the count of the next block; the
    stem has one more than the first block.

    Source: arXiv:2003.10555, section 3.2 (layer-wise decay); arXiv:2106.08254 for images.
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
    decay_vectors: bool = True,
) -> torch.optim.AdamW:
    """Build AdamW with the groups of :func:`parameter_groups`, which documents the arguments."""
    groups = parameter_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        no_decay_names=no_decay_names,
        lr_factors=lr_factors,
        layer_decay=layer_decay,
        decay_vectors=decay_vectors,
    )
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a training and course of its learning rate, independent of the data set.

    Attributes:
        epochs: length in passes over the training set, or None.
        iterations: length in iterations, or None. Exactly one of the two is set.
        decay: "multistep"; "cosine" to ``final_factor``; or "poly" to zero.
        milestones: for "multistep", in the unit of the length.
        gamma: factor at each milestone.
        power: for "poly"; 1 is linear.
        final_factor: for "cosine", factor at the end.
        warmup_iterations: length of the linear warm-up.
        warmup_factor: factor on the learning rate at its start.
    Raises: ValueError for inconsistent fields.
    """

    epochs: float | None = None
    iterations: int | None = None
    decay: str = "multistep"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    power: float = 1.0
    final_factor: float = 0.0
    warmup_iterations: int = 500
    warmup_factor: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(
                "A schedule needs either epochs or iterations: set the other one to None."
            )
        if self.length <= 0:
            raise ValueError(f"The length of a schedule must be positive, got {self.length}.")
        if self.decay not in ("multistep", "cosine", "poly"):
            raise ValueError(f"Unknown decay {self.decay!r}. Known: cosine, multistep, poly.")

    @property
    def length(self) -> float:
        """Return the length in epochs or iterations, whichever is set."""
        length = self.epochs if self.iterations is None else self.iterations
        assert length is not None
        return length

    def max_iter(self, iterations_per_epoch: int) -> int:
        """Return the length in iterations."""
        return self._to_iterations(self.length, iterations_per_epoch)

    def multiplier(self, iterations_per_epoch: int) -> ParamScheduler:
        """Build the learning-rate factor over the training, for Detectron2's ``LRMultiplier``."""
        total = self.max_iter(iterations_per_epoch)
        if self.decay == "cosine":
            scheduler: ParamScheduler = CosineParamScheduler(1.0, self.final_factor)
        elif self.decay == "poly":
            scheduler = PolynomialDecayParamScheduler(1.0, self.power)
        else:
            steps = [self._to_iterations(m, iterations_per_epoch) for m in self.milestones]
            # A shortened training may end before a milestone.
            steps = [step for step in steps if step < total]
            values = [self.gamma**i for i in range(len(steps) + 1)]
            scheduler = MultiStepParamScheduler(values, milestones=steps, num_updates=total)
        if self.warmup_iterations == 0:
            return scheduler
        warmup = min(self.warmup_iterations / total, 1.0)
        return WarmupParamScheduler(scheduler, self.warmup_factor, warmup, "linear")

    def _to_iterations(self, length: float, iterations_per_epoch: int) -> int:
        unit = iterations_per_epoch if self.iterations is None else 1
        return max(1, round(length * unit))
