"""Fit a backbone's tensors, in official names, to a network of other sizes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbones.attention import TOPK_BUFFER
from .layouts.focal_transformer_names import takes_set
from .layouts.tables import OUTPUT_NORMS
from .resize import identity_kernel, resize_gates, resize_image_channels, resize_kernel

State = Mapping[str, Tensor]
LEVEL_MODES = ("official", "by_kernel", "preserving", "shrink")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Counters and indices, which are no weights.
INTEGER = re.compile(rf"(num_batches_tracked|relative_position_index|{TOPK_BUFFER}\d)$")

# Names that a file may hold and a network lack, each by a named rule.
CLASSIFIER = re.compile(r"^(head|norm)\.(weight|bias)$")
OUTPUT_NORM = re.compile(rf"^({'|'.join(OUTPUT_NORMS)})\.(weight|bias)$")
KERNEL = re.compile(r"^(layers\.\d+\.blocks\.\d+\.modulation\.)focal_layers\.(\d+)\.0\.weight$")
GATES = re.compile(r"^(layers\.\d+\.blocks\.\d+\.modulation\.)f\.(weight|bias)$")
STEM = "patch_embed.proj.weight"


@dataclass
class Fit:
    """What a file becomes in a network: names in official form.

    Attributes:
        tensors: to be loaded.
        resized: name -> what was done to it.
        dropped: name -> rule.
        problems: why nothing can be loaded, empty if all is well.
        cropped: kernels that are larger in the file, whose borders were cut off.
        global_levels: modulation -> level that its global context goes on reading.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    global_levels: dict[str, float] = field(default_factory=dict)
    cropped: list[str] = field(default_factory=list)

    def prefixed(self, prefix: str) -> "Fit":
        """Return the same with the names that a backbone's parameters have in a detector."""
        return Fit(
            tensors={prefix + name: tensor for name, tensor in self.tensors.items()},
            resized={prefix + name: text for name, text in self.resized.items()},
            dropped={prefix + name: rule for name, rule in self.dropped.items()},
            problems=self.problems,
            global_levels={prefix + name: level for name, level in self.global_levels.items()},
            cropped=[prefix + name for name in self.cropped],
        )


def fit_backbone(
    tensors: State,
    target: State,
    *,
    resize: bool = True,
    levels: str | None = None,
    normalized: bool = False,
) -> Fit:
    """Fit tensors to a network, without changing either.

    Args:
        tensors: of the file.
        target: the network's state dict.
        resize: allow other kernel sizes and image channels.
        levels: how other numbers of focal levels are treated, one of ``LEVEL_MODES``; None refuses.
        normalized: the network divides its modulators by the number of contexts, levels and global
            one, which preserving growth makes up for.
    Raises: ValueError for an unknown mode.
    """
    if levels is not None and levels not in LEVEL_MODES:
        raise ValueError(f"levels must be None or one of {LEVEL_MODES}, got {levels!r}.")
    fit = Fit()
    tensors = _fit_levels(dict(tensors), target, levels, normalized, fit)
    for name, tensor in tensors.items():
        module = name.removesuffix(".global_level")
        if module != name:
            fit.global_levels[module] = float(tensor)
        elif takes_set(name, target):
            problem = value_problem(name, tensor)
            fit.problems += [] if problem is None else [problem]
            fit.tensors[name] = tensor
        elif name not in target:
            rule = unneeded(name, target)
            if rule is None:
                fit.problems.append(f"{name} is not in the network")
            else:
                fit.dropped[name] = rule
        else:
            _fit_one(name, tensor, target[name], resize, fit)
    return fit


def value_problem(name: str, tensor: Tensor, expected: torch.dtype | None = None) -> str | None:
    """Say why a tensor of a file cannot be what its name says, None if it can.

    Args:
        expected: dtype in the network; None for a weight, or a counter or index by its name.
    """
    if expected is None:
        expected = torch.int64 if INTEGER.search(name) else torch.float32
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype.startswith("float8"):
        return f"{name} is {dtype}: without its scales it is no weight; save it as bfloat16"
    if tensor.is_floating_point() != expected.is_floating_point or (
        tensor.is_floating_point() and tensor.dtype not in FLOATS
    ):
        wanted = str(expected).removeprefix("torch.")
        return f"{name} is {dtype} in the file, where {wanted} is expected"
    if not tensor.is_meta and not torch.isfinite(tensor).all():
        return f"{name} has NaN or infinite values in the file"
    return None


def _fit_one(name: str, tensor: Tensor, target: Tensor, resize: bool, fit: Fit) -> None:
    problem = value_problem(name, tensor, target.dtype)
    if problem is not None:
        fit.problems.append(problem)
        return
    if tensor.shape != target.shape:
        try:
            resized = _resized(name, tensor, target) if resize else None
        except ValueError as error:
            fit.problems.append(f"{name}: {str(error).rstrip('.')}")
            return
        if resized is None:
            hint = "" if resize else "; resizing is off"
            fit.problems.append(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(target.shape)} in the "
                f"network{hint}"
            )
            return
        fit.resized[name] = f"{tuple(tensor.shape)} -> {tuple(target.shape)}"
        # A border of zeros, as padding leaves it, is no loss.
        if KERNEL.match(name) and resized.count_nonzero() < tensor.count_nonzero():
            fit.cropped.append(name)
        tensor = resized
    fit.tensors[name] = tensor


def _resized(name: str, tensor: Tensor, target: Tensor) -> Tensor | None:
    """Return the tensor at the size of the target; None if only an error can be right."""
    if tensor.ndim != 4 or target.ndim != 4:
        return None
    if KERNEL.match(name) and tensor.shape[:2] == target.shape[:2]:
        return resize_kernel(tensor, target.shape[-1])
    same = tensor.shape[0] == target.shape[0] and tensor.shape[2:] == target.shape[2:]
    if name == STEM and same and 0 not in tensor.shape:
        return resize_image_channels(tensor, target.shape[1])
    return None


def unneeded(name: str, target: State) -> str | None:
    """Return the rule by which a file may hold a name that the network lacks, or None.

    A backbone has no classifier, and none of the stages, downsamplings and output norms that its
    ``out_features`` do not need.
    """
    if CLASSIFIER.match(name):
        return "classifier"
    if OUTPUT_NORM.match(name):
        return "norm of an output that is not asked for"
    stage = re.match(r"layers\.(\d+)\.(downsample\.)?", name)
    last = max((int(n.split(".")[1]) for n in target if n.startswith("layers.")), default=-1)
    if stage is None or last < 0:
        return None
    index = int(stage[1])
    if index > last or (index == last and stage[2] is not None):
        return "stage that is not asked for"
    return None


def _fit_levels(
    tensors: dict[str, Tensor], target: State, mode: str | None, normalized: bool, fit: Fit
) -> dict[str, Tensor]:
    """Bring every modulation that both sides have to the target's number of levels."""
    for name in [n for n in target if GATES.match(n) and n.endswith("weight")]:
        module = name.removesuffix("f.weight")
        if name not in tensors or tensors[name].ndim != 2:
            continue
        # (2C + L + 1, C)
        rows, dim = tensors[name].shape
        old, new = rows - 2 * dim - 1, target[name].shape[0] - 2 * target[name].shape[1] - 1
        if dim != target[name].shape[1] or old < 1 or old == new:
            continue
        kernels = [tensors.get(f"{module}focal_layers.{k}.0.weight") for k in range(old)]
        bias = tensors.get(f"{module}f.bias")
        if bias is None or bias.shape != (rows,) or not all(_is_kernel(k) for k in kernels):
            continue  # damaged: what is missing is named later
        if mode is None or (mode == "shrink") != (new < old):
            fit.problems.append(_level_problem(module, old, new, mode))
            return tensors
        present = [kernel for kernel in kernels if kernel is not None]
        sizes = [target[f"{module}focal_layers.{k}.0.weight"].shape[-1] for k in range(new)]
        _regroup(tensors, module, present, sizes, mode, fit)
        if mode == "preserving" and normalized:
            for part in ("weight", "bias"):
                gates = tensors[f"{module}f.{part}"][2 * dim :]
                gates *= (new + 1) / (old + 1)
    return tensors


def _is_kernel(kernel: Tensor | None) -> bool:
    return kernel is not None and kernel.ndim == 4


def _level_problem(module: str, old: int, new: int, mode: str | None) -> str:
    text = f"{module.rstrip('.')} has {old} focal levels in the file, {new} in the network"
    if mode is not None:
        return f'{text}, which levels="{mode}" is not for'
    if new < old:
        return f'{text}; levels="shrink" drops the last ones and measures what that changes'
    return (
        f'{text}; levels="preserving" adds levels that change nothing at first, levels="official" '
        "those of the official code"
    )


def _regroup(
    tensors: dict[str, Tensor],
    module: str,
    kernels: list[Tensor],
    sizes: list[int],
    mode: str,
    fit: Fit,
) -> None:
    """Write gates and kernels of one modulation for ``len(sizes)`` levels."""
    dim, old, new = kernels[0].shape[0], len(kernels), len(sizes)
    sources = _sources([kernel.shape[-1] for kernel in kernels], sizes, mode)
    for part in ("weight", "bias"):
        name = f"{module}f.{part}"
        before = tensors[name]
        tensors[name] = resize_gates(before, dim, sources)
        fit.resized[name] = f"{tuple(before.shape)} -> {tuple(tensors[name].shape)}"
    for k in range(max(old, new)):
        tensors.pop(f"{module}focal_layers.{k}.0.weight", None)
    for k, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        name = f"{module}focal_layers.{k}.0.weight"
        if source is not None:
            tensors[name] = kernels[source]
        elif mode == "preserving":
            tensors[name] = identity_kernel(dim, size, kernels[0])
            fit.resized[name] = "new level: identity kernel"
    if mode == "preserving":
        fit.global_levels[module.rstrip(".")] = float(old)
        shrunk = [k for k in range(old) if kernels[k].shape[-1] > sizes[k]]
        if shrunk:
            fit.problems.append(
                f"{module}focal_layers.{shrunk[0]} has a larger kernel in the file: levels="
                '"preserving" cannot crop kernels'
            )


def _sources(old: list[int], new: list[int], mode: str) -> list[int | None]:
    """Return which old level each new one takes its weights from, by index or by kernel size."""
    if mode == "by_kernel":
        return [old.index(size) if size in old else None for size in new]
    return [k if k < len(old) else None for k in range(len(new))]
