"""Check that a checkpoint matches the run that resumes from it."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
import yaml
from torch import Tensor

from ..moved import current_name
from .sharding import shard_moments

# Keys of .py and .yaml configs that may change between a checkpoint and the run that resumes from
# it. All others affect the meaning of the saved state.
FREE = (
    *("schedule.*", "optimizer.*", "train.*", "dataloader.test*", "dataloader.evaluator*"),
    *("*.num_workers", "*activation_checkpointing*", "*ACTIVATION_CHECKPOINTING*"),
    *("SOLVER.*", "TEST.*", "OUTPUT_DIR", "VERSION", "*.NUM_WORKERS", "DATASETS.TEST*"),
    *("INPUT.*_TEST", "MODEL.*_TEST", "MODEL.WEIGHTS", "MODEL.DEVICE", "VIS_PERIOD"),
    "CUDNN_BENCHMARK",
)
# Exceptions to FREE.
BOUND = ("SOLVER.IMS_PER_BATCH", "SOLVER.OPTIMIZER", "optimizer._target_", "train.seed")
# Differences listed in a message; the rest are counted.
MAX_LISTED = 6


def flatten(text: str) -> dict[str, str]:
    """Flatten the YAML text of a config to values by dotted key."""
    values: dict[str, str] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                visit(child, f"{key}.{name}" if key else str(name))
        elif isinstance(node, (list, tuple)) and any(isinstance(x, (dict, list)) for x in node):
            for i, child in enumerate(node):
                visit(child, f"{key}.{i}")
        else:
            # Configs of earlier versions contain earlier module names.
            values[key] = current_name(str(list(node) if isinstance(node, tuple) else node))

    visit(yaml.safe_load(text) or {}, "")
    return values


def config_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Compare the flattened configs of a checkpoint and of this run.

    Returns: permitted changes, and changes that a resumed run must not make, each "key was A, is B
        now".
    """
    applied: list[str] = []
    refused: list[str] = []
    for key in sorted(saved.keys() | now.keys()):
        before, after = saved.get(key, "absent"), now.get(key, "absent")
        if before == after:
            continue
        free = any(fnmatch(key, pattern) for pattern in FREE) and key not in BOUND
        (applied if free else refused).append(f"{key} was {before}, is {after} now")
    return applied, refused


def named(differences: list[str]) -> str:
    """Join the first few differences, and count the rest."""
    rest = len(differences) - MAX_LISTED
    return "; ".join(differences[:MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def check_same_tensors(saved: Mapping[str, Tensor], now: Mapping[str, Tensor], what: str) -> None:
    """Check that two state dicts have the same names and shapes.

    Args:
        saved: of the checkpoint.
        now: of this run.
        what: description, for the message.
    Raises: ValueError with the first differences.
    """
    differences = [
        f"{name} is {tuple(saved[name].shape)} in the checkpoint and {tuple(tensor.shape)} here"
        for name, tensor in now.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    differences += [f"the checkpoint lacks {name}" for name in now if name not in saved]
    differences += [f"only the checkpoint has {name}" for name in saved if name not in now]
    if differences:
        raise ValueError(f"{what} differ: {named(differences)}")


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load moments and step counts, but keep learning rates, weight decay and other options.

    Raises: ValueError if the state belongs to another kind of optimizer or other parameters.
    """
    groups, now = saved["param_groups"], optimizer.param_groups
    counts = [len(g["params"]) for g in groups], [len(g["params"]) for g in now]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the parameter groups of the optimizer differ: sizes {counts[0]} in the checkpoint, "
            f"{counts[1]} here"
        )
    ids = [i for g in groups for i in g["params"]]
    parameters = [p for g in now for p in g["params"]]
    for number, parameter in zip(ids, parameters, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer differs: {name} of a parameter of shape "
                    f"{tuple(parameter.shape)} has shape {tuple(value.shape)} in the checkpoint"
                )
    # These options tell Adam and SGD apart, whose states are incompatible.
    kinds = {name for name in ("betas", "momentum") for g in groups if name in g}
    if kinds != {name for name in ("betas", "momentum") for g in now if name in g}:
        raise ValueError("the checkpoint contains the state of another kind of optimizer")
    options = [{k: v for k, v in g.items() if k != "params"} for g in now]
    optimizer.load_state_dict(shard_moments(saved, parameters))
    for group, kept in zip(optimizer.param_groups, options, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(kept, params=parameters)
