"""Build a trained model from a run or a checkpoint alone."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.data import Metadata
from torch import nn

from ..checkpoint.files import check_file
from ..checkpoint.global_level import saved_global_levels, set_global_levels
from ..engine.checkpoints import best_checkpoint
from ..engine.run_folder import CONFIG
from ..experiment import (
    Experiment,
    load_config,
    load_config_text,
    read_experiment,
    register_all,
)


@dataclass(frozen=True)
class TrainedModel:
    """A model with its weights, and what its outputs mean.

    Attributes:
        model: in eval mode, on its device.
        experiment: that it was trained by; its options name the device of the model.
        metadata: of the classes, as Detectron2's visualizers and evaluators take it.
        path: of the checkpoint.
    """

    model: nn.Module
    experiment: Experiment
    metadata: Metadata
    path: Path


def find_checkpoint(source: str | Path) -> Path:
    """Find the checkpoint to use: a file itself, or of a run's folder the best there is.

    Raises: ValueError if there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give the folder of a run, or a checkpoint.")
    found = best_checkpoint(path)
    if found is None:
        raise ValueError(
            f"{path} holds no checkpoint (model_*.pth): train first, or give the checkpoint itself."
        )
    return found


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a training without running anything that is in it.

    Raises: ValueError if it is damaged, or no checkpoint of this package.
    """
    if (problem := check_file(path)) is not None:
        raise ValueError(f"{path}: {problem}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of focalnet_det: start from it with "
            "train.init_checkpoint, or convert it with tools/convert_checkpoint.py."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} has no model: give a checkpoint that a training wrote.")
    return content


def load_trained(
    source: str | Path, *, config: str | Path | None = None, device: str | None = None
) -> TrainedModel:
    """Build the model of a run or a checkpoint, with its weights.

    Args:
        source: folder of a run, or one of its checkpoints.
        config: for checkpoints that do not hold their config, which older versions wrote: the
            config file of the training.
        device: of PyTorch; None for a GPU if there is one.
    Raises: ValueError if there is no checkpoint, it has no config, or they do not fit together.
    """
    path = find_checkpoint(source)
    content = read_checkpoint(path)
    register_all()
    experiment = _experiment(path, content, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = replace(experiment.options, device=_checked(device))
    experiment = replace(experiment, options=options)
    model = experiment.model()
    try:
        set_global_levels(model, saved_global_levels(content["model"]))
        model.load_state_dict(content["model"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"The weights in {path} do not fit its config: {' '.join(reason[:4])}"
        ) from error
    metadata = _metadata(content, experiment)
    return TrainedModel(model.to(device).eval(), experiment, metadata, path)


def _experiment(path: Path, content: Mapping[str, Any], config: str | Path | None) -> Experiment:
    if config is not None:
        return read_experiment(load_config(config, []))
    if text := content.get("run", {}).get("config"):
        return read_experiment(load_config_text(text))
    beside = path.parent / CONFIG
    if beside.is_file():
        return read_experiment(load_config(beside, []))
    raise ValueError(
        f"{path} does not hold the config of its training, and there is no {CONFIG} beside it: "
        "name the config (config=FILE, or --config-file FILE)."
    )


def _checked(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"Device {device!r} cannot be used: {reason}") from error
    return device


def _metadata(content: Mapping[str, Any], experiment: Experiment) -> Metadata:
    """Return metadata of the classes that the catalog does not know."""
    described = dict(content.get("metadata") or {})
    names = list(content.get("class_names") or ())
    if not described and not names:
        # Written by an older version: a registered dataset may still name the classes.
        described = experiment.dataset_metadata
    if not described:
        count = experiment.settings.model.classes or 0
        names = names or [f"class {index}" for index in range(count)]
        described = {"thing_classes": names, "stuff_classes": names}
    metadata = Metadata(name="trained model")
    metadata.set(**described)
    return metadata
