"""Whether a checkpoint is that of this run, said in one sentence if not."""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
import yaml
from torch import Tensor

from ..moved import current_name

# Keys of a config that may differ between a checkpoint and the run that continues it; by the names
# of .py configs and of .yaml configs. All others decide what the saved state means.
FREE = (
    *("schedule.*", "optimizer.*", "train.*", "dataloader.test*", "dataloader.evaluator*"),
    *("*.num_workers", "*activation_checkpointing*", "*ACTIVATION_CHECKPOINTING*"),
    *("SOLVER.*", "TEST.*", "OUTPUT_DIR", "VERSION", "*.NUM_WORKERS", "DATASETS.TEST*"),
    *("INPUT.*_TEST", "MODEL.*_TEST", "MODEL.WEIGHTS", "MODEL.DEVICE", "VIS_PERIOD"),
    "CUDNN_BENCHMARK",
)
# Exceptions to the above.
BOUND = ("SOLVER.IMS_PER_BATCH", "SOLVER.OPTIMIZER", "optimizer._target_", "train.seed")
# Differences that are said one by one; the rest is counted.
MOST_NAMED = 6


def flatten(text: str) -> dict[str, str]:
    """Return the values of a config's yaml text by dotted key."""
    values: dict[str, str] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                visit(child, f"{key}.{name}" if key else str(name))
        elif isinstance(node, (list, tuple)) and any(isinstance(x, (dict, list)) for x in node):
            for i, child in enumerate(node):
                visit(child, f"{key}.{i}")
        else:
            # A run that an earlier version began calls modules by their earlier names.
            values[key] = current_name(str(list(node) if isinstance(node, tuple) else node))

    visit(yaml.safe_load(text) or {}, "")
    return values


def config_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Compare the configs of a checkpoint and of this run, see :func:`flatten`.

    Returns: the changes that are applied, and those that a resumed run must not make; each "key
        was A, is B now".
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
    """Join differences, the first few by name."""
    more = len(differences) - MOST_NAMED
    return "; ".join(differences[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def check_same_tensors(saved: Mapping[str, Tensor], now: Mapping[str, Tensor], what: str) -> None:
    """Check that two state dicts have the same names and shapes.

    Args:
        what: they are, for the message.
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
    """Load moments and step counts; rates, weight decay and other options stay as they are.

    Raises: ValueError if they are of another optimizer or of other parameters.
    """
    groups, now = saved["param_groups"], optimizer.param_groups
    counts = [len(g["params"]) for g in groups], [len(g["params"]) for g in now]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the optimizer's groups differ: {counts[0]} parameters in the checkpoint, {counts[1]} "
            "here"
        )
    ids = [i for g in groups for i in g["params"]]
    parameters = [p for g in now for p in g["params"]]
    for number, parameter in zip(ids, parameters, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer differs: {name} of a parameter of {tuple(parameter.shape)} is "
                    f"{tuple(value.shape)} in the checkpoint"
                )
    # What each kind of optimizer keeps, such as exp_avg or momentum_buffer.
    kinds = {name for name in ("betas", "momentum") for g in groups if name in g}
    if kinds != {name for name in ("betas", "momentum") for g in now if name in g}:
        raise ValueError("the checkpoint holds the state of another kind of optimizer")
    options = [{k: v for k, v in g.items() if k != "params"} for g in now]
    optimizer.load_state_dict(dict(saved))
    for group, kept in zip(optimizer.param_groups, options, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(kept, params=parameters)
