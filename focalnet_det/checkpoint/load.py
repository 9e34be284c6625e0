"""Strict loading: every key of a file is used, resized, dropped by name, or an error."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .resize import resize_kernel

# Where a file keeps its tensors, and what wraps the names of a backbone inside a detector.
CONTAINERS = ("model", "state_dict", "model_state_dict")
PREFIXES = ("backbone.bottom_up.", "backbone.")
# Parts of a classifier that a backbone does not have.
CLASSIFIER = re.compile(r"^(head|norm)\.(weight|bias)$")
# Layers of Detectron2's heads whose size is a number of classes.
CLASS_LAYERS = re.compile(r"\.(cls_score|bbox_pred|predictor)\.")


@dataclass
class LoadReport:
    """What became of every tensor of a file and of the model.

    Attributes:
        loaded: names that were taken as they are.
        resized: names whose kernels were padded or cropped, with old and new shape.
        dropped: names in the file that the model does not need.
        missing: names in the model that the file does not have: they keep their initial values.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"Loaded {len(self.loaded)} tensors, resized {len(self.resized)}, "
            f"dropped {len(self.dropped)}; {len(self.missing)} are new."
        )
        for title, names in (("Dropped", self.dropped), ("New", self.missing)):
            if names:
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                text += f"\n  {title}: {shown}"
        return text


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, by name, on the CPU.

    Nothing but tensors and plain containers is unpickled, so a file cannot run code.

    Raises: ValueError if the file is missing, damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"No such checkpoint: {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"Could not read {path} as a file of tensors: it is damaged, or holds Python objects, "
            "which are never loaded because they can run code. Save its state dict alone with "
            f"torch.save(model.state_dict(), ...) where it was made. ({first_line})"
        ) from error
    return unwrap(content, str(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package safetensors: pip install safetensors."
        ) from error
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(f"Could not read {path}: {error}.") from error


def unwrap(content: Any, origin: str) -> dict[str, Tensor]:
    """The state dict inside what a file holds, without its containers.

    Raises: ValueError if there is none.
    """
    while isinstance(content, Mapping):
        inner = next((content[k] for k in CONTAINERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = (
        {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise ValueError(f"{origin} holds no state dict.")
    if all(name.startswith("module.") for name in tensors):  # saved from DistributedDataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def load_pretrained(net: nn.Module, weights: str | Path | Mapping[str, Any]) -> LoadReport:
    """Loads a backbone from the official layout: a classifier's file, or a detector's.

    Depthwise kernels of another size are centre-padded or cropped. Nothing is loaded unless
    everything fits.

    Args:
        net: a backbone.
        weights: path, or state dict.
    Returns: what happened to every tensor.
    Raises: ValueError if the file cannot be read, belongs to another network, or holds names or
        shapes that the network does not have.
    """
    if isinstance(weights, Mapping):
        tensors, origin = unwrap(weights, "The given dict"), "the given state dict"
    else:
        tensors, origin = read_state_dict(weights), str(weights)
    tensors, others = split_backbone(tensors)
    target = net.state_dict()
    report, fitted, problems = LoadReport(dropped=others), {}, []
    for name, tensor in tensors.items():
        if name not in target:
            if is_unneeded(name, target):
                report.dropped.append(name)
            else:
                problems.append(f"{name} is not in the network")
        elif tensor.shape == target[name].shape:
            fitted[name] = tensor
            report.loaded.append(name)
        elif ".focal_layers." in name and tensor.shape[:2] == target[name].shape[:2]:
            fitted[name] = resize_kernel(tensor, target[name].shape[-1])
            report.resized.append(name)
        else:
            problems.append(
                f"{name} is {tuple(tensor.shape)} in the file, "
                f"{tuple(target[name].shape)} in the network"
            )
    # Output norms belong to detection and are in no classifier's file.
    new = [name for name in target if name not in fitted]
    problems += [f"{n} is not in the file" for n in new if not re.match(r"norm\d\.", n)]
    raise_problems(problems, origin)
    report.missing = new
    net.load_state_dict(fitted, strict=False)
    return report


def split_backbone(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's part of a state dict, without a detector's prefix, and the other names."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            return inside, [name for name in tensors if not name.startswith(prefix)]
    return dict(tensors), []


def is_unneeded(name: str, target: Mapping[str, Tensor]) -> bool:
    """Whether a file may hold a name that the network lacks.

    A backbone has no classifier, and none of the stages, downsamplings and output norms that its
    ``out_features`` do not need.
    """
    if CLASSIFIER.match(name) or re.match(r"norm\d\.", name):
        return True
    stage = re.match(r"layers\.(\d+)\.(downsample\.)?", name)
    if stage is None:
        return False
    index, last = (
        int(stage[1]),
        max(int(n.split(".")[1]) for n in target if n.startswith("layers.")),
    )
    return index > last or (index == last and stage[2] is not None)


def load_initial_weights(
    model: nn.Module, path: str | Path, *, new_classes: bool = True
) -> LoadReport:
    """Starts a detector from a file: a whole detector saved here, or a backbone alone.

    Args:
        model: a Detectron2 model with a ``backbone``, which may be an FPN over ``bottom_up``.
        path: of the file.
        new_classes: let the last layers of the heads start anew where their class count differs;
            False, for evaluation, demands every tensor.
    Returns: what happened to every tensor.
    Raises: ValueError as :func:`load_pretrained`; nothing is loaded then.
    """
    tensors = read_state_dict(path)
    target = model.state_dict()
    if not any(name in target for name in tensors):
        if not new_classes:
            raise ValueError(f"{path} holds no weights of this detector; is it a backbone's file?")
        backbone = model.get_submodule("backbone")
        return load_pretrained(getattr(backbone, "bottom_up", backbone), tensors)
    report, fitted, problems = LoadReport(), {}, []
    for name, tensor in tensors.items():
        if name not in target:
            problems.append(f"{name} is not in the model")
        elif target[name].shape == tensor.shape:
            fitted[name] = tensor
            report.loaded.append(name)
        elif new_classes and CLASS_LAYERS.search(name):
            report.dropped.append(name)
        else:
            problems.append(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(target[name].shape)} here"
            )
    problems += [f"{name} is not in the file" for name in target if name not in tensors]
    raise_problems(problems, str(path))
    report.missing = [name for name in target if name not in fitted]
    model.load_state_dict(fitted, strict=False)
    return report


def raise_problems(problems: list[str], origin: str) -> None:
    """Raises: ValueError that names the first problem and counts the others, if there are any."""
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{origin} does not fit this network, nothing was loaded: {problems[0]}{more}."
        )
