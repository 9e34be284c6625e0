"""Replay an iteration with NaN or infinity, and locate its origin."""

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
from .precision import autocast
from .random_state import restore_random_states


@dataclass
class Replay:
    """Results of one process in the iteration.

    Attributes:
        process: rank.
        images: file names.
        losses: by name.
        module: name of the first module whose output is not finite, "" for none.
        gradient: name of the first parameter whose gradient is not finite, "" for none.
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
    """Read a file of :func:`~focalnet_det.engine.numerics.write_trouble`.

    Raises: ValueError if it has another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{path} is not a replay file: {error}") from error
    if not isinstance(content, dict) or not {"model", "processes", "config"} <= content.keys():
        raise ValueError(f"{path} is not a replay file but another kind of checkpoint.")
    return content


def replay_file(path: str | Path, *, device: str = "cpu") -> list[Replay]:
    """Replay the iteration of a file, process by process.

    Args:
        path: ``trouble_NNNNNNN.pth`` of a run, with weights, samples and random states.
        device: to compute on; rounding differs between kinds of devices.
    Raises: ValueError if the file has another format.
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
    """Build the experiment of a saved config."""
    return read_experiment(load_config_text(text))


def replay(
    model: nn.Module, state: Mapping[str, Any], process: int, experiment: Experiment
) -> Replay:
    """Replay the iteration of one process, leaving its gradients in the model.

    Args:
        model: in training mode, with the weights of the iteration.
        state: samples and random states of the process.
        process: rank.
        experiment: provides the options.
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
            # Detectron2's heads require an EventStorage.
            with EventStorage(), autocast(experiment.options):
                losses = model(data[part * size : (part + 1) * size])
            (sum(losses.values()) / parts).backward()
            for name, loss in losses.items():
                found.losses[name] = found.losses.get(name, 0.0) + float(loss.detach()) / parts
    except FloatingPointError as error:
        # Raised by Detectron2's own checks of predictions.
        found.module = found.module or str(error)
    finally:
        for handle in handles:
            handle.remove()
    found.gradient = first_not_finite((n, p.grad) for n, p in model.named_parameters()) or ""
    return found


def _note_first(found: Replay, name: str) -> Any:
    """Return a forward hook that records the first, innermost module with a non-finite output."""

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
