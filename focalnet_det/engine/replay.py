"""Compute an iteration with numerical trouble again, and say where the trouble begins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..checkpoint.global_level import saved_global_levels, set_global_levels
from ..experiment import Experiment, load_config_text, read_experiment
from .numerics import first_not_finite, unpack_example
from .random_state import restore_random_states
from .trainer import autocast


@dataclass
class Replay:
    """What one process computed in the iteration.

    Attributes:
        process: its rank.
        images: file names.
        losses: by name.
        module: name of the first module whose output is not finite, "" if all are.
        gradient: name of the first parameter whose gradient is not finite, "" if all are.
        largest: name and absolute value of the largest weight.
    """

    process: int
    images: list[str] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    module: str = ""
    gradient: str = ""
    largest: tuple[str, float] = ("", 0.0)

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {value:g}" for name, value in self.losses.items())
        return "\n".join(
            [
                f"process {self.process}: {', '.join(self.images)}",
                f"  losses: {losses}",
                f"  first module with an output that is not finite: {self.module or 'none'}",
                f"  first gradient that is not finite: {self.gradient or 'none'}",
                f"  largest weight: {self.largest[0]}, {self.largest[1]:g}",
            ]
        )


def read_trouble(path: str | Path) -> dict[str, Any]:
    """Read a file of numerical trouble.

    Raises: ValueError if it is none.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{path} is not a file of numerical trouble: {error}") from error
    if not isinstance(content, dict) or not {"model", "processes", "config"} <= content.keys():
        raise ValueError(f"{path} is not a file of numerical trouble, but another checkpoint.")
    return content


def replay_file(path: str | Path, *, device: str = "cpu") -> list[Replay]:
    """Compute the iteration of a file again, process by process.

    Args:
        path: ``trouble_NNNNNNN.pth`` of a run; it holds weights, examples and random states.
        device: to compute on. Others than that of the run round differently.
    Raises: ValueError if the file is of another kind.
    """
    content = read_trouble(path)
    experiment = experiment_of(content["config"])
    experiment.options.device = device
    model = experiment.model()
    set_global_levels(model, saved_global_levels(content["model"]))
    model.load_state_dict(content["model"])
    model.to(device).train()
    return [
        replay(model, state, process, experiment)
        for process, state in enumerate(content["processes"])
    ]


def experiment_of(text: str) -> Experiment:
    """Return the experiment of a config that a run has saved."""
    return read_experiment(load_config_text(text))


def replay(
    model: nn.Module, state: Mapping[str, Any], process: int, experiment: Experiment
) -> Replay:
    """Compute what one process computed; the model's gradients are its own afterwards.

    Args:
        model: in training mode, with the weights of the iteration.
        state: the examples and random states of the process.
    """
    data = [unpack_example(example) for example in state["data"]]
    found = Replay(process, [str(example.get("file_name", "?")) for example in data])
    weights = [(n, float(p.detach().abs().max())) for n, p in model.named_parameters() if p.numel()]
    found.largest = max(weights, key=lambda item: item[1], default=("", 0.0))
    handles = [
        module.register_forward_hook(_note_first(found, name))
        for name, module in model.named_modules()
        if name
    ]
    model.zero_grad(set_to_none=True)
    restore_random_states(state["random"], "cpu")
    parts = experiment.options.accumulation
    size = len(data) // parts
    try:
        for part in range(parts):
            # Detectron2's heads write metrics.
            with EventStorage(), autocast(experiment.options):
                losses = model(data[part * size : (part + 1) * size])
            (sum(losses.values()) / parts).backward()
            for name, loss in losses.items():
                found.losses[name] = found.losses.get(name, 0.0) + float(loss.detach()) / parts
    except FloatingPointError as error:
        # Detectron2 checks some predictions itself.
        found.module = found.module or str(error)
    finally:
        for handle in handles:
            handle.remove()
    found.gradient = first_not_finite((n, p.grad) for n, p in model.named_parameters()) or ""
    return found


def _note_first(found: Replay, name: str) -> Any:
    """Return a hook that notes the first module, innermost first, with a bad output."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
        if not found.module and any(not t.isfinite().all() for t in _tensors(output)):
            found.module = name

    return hook


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in _tensors(item)]
    return []
