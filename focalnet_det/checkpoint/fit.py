"""Fit the tensors of a backbone, in official names, to a network of other sizes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbones.attention import TOPK_BUFFER
from .layouts.focal_transformer_names import reads_set
from .layouts.tables import OUTPUT_NORMS
from .resize import identity_kernel, resize_gates, resize_image_channels, resize_kernel

State = Mapping[str, Tensor]
LEVEL_MODES = ("official", "by_kernel", "preserving", "shrink")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Counters and indices, which are not weights.
INTEGER = re.compile(rf"(num_batches_tracked|relative_position_index|{TOPK_BUFFER}\d)$")

# Names that a file may have and the network may not, each dropped by a named rule.
CLASSIFIER = re.compile(r"^(head|norm)\.(weight|bias)$")
MASKED_IMAGES = re.compile(r"^(mask_token$|decoder\.0\.)")
OUTPUT_NORM = re.compile(rf"^({'|'.join(OUTPUT_NORMS)})\.(weight|bias)$")
KERNEL = re.compile(r"^(layers\.\d+\.blocks\.\d+\.modulation\.)focal_layers\.(\d+)\.0\.weight$")
GATES = re.compile(r"^(layers\.\d+\.blocks\.\d+\.modulation\.)f\.(weight|bias)$")
STEM = "patch_embed.proj.weight"


@dataclass
class Fit:
    """Result of fitting a file to a network, in official names.

    Attributes:
        tensors: tensors to load.
        resized: name -> description of the change.
        dropped: name -> rule by which it is dropped.
        problems: reasons why nothing can be loaded, empty if all tensors fit.
        cropped: kernels that are larger in the file and lose their borders.
        global_levels: modulation -> level that its global context continues to read.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    global_levels: dict[str, float] = field(default_factory=dict)
    cropped: list[str] = field(default_factory=list)

    def prefixed(self, prefix: str) -> "Fit":
        """Return a copy whose names have the prefix of the backbone in a detector."""
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
        tensors: tensors of the file.
        target: state dict of the network.
        resize: allow other kernel sizes and image channels.
        levels: what to do if the numbers of focal levels differ, one of ``LEVEL_MODES``; None
            refuses.
        normalized: the network divides its modulators by the number of contexts (levels plus
            global), for which levels="preserving" compensates.
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
        elif reads_set(name, target):
            problem = value_problem(name, tensor)
            fit.problems += [] if problem is None else [problem]
            fit.tensors[name] = tensor
        elif name in target:
            _fit_one(name, tensor, target[name], resize, fit)
        elif (rule := drop_rule(name, target)) is not None:
            fit.dropped[name] = rule
        else:
            fit.problems.append(f"{name} is not in the network")
    return fit


def value_problem(name: str, tensor: Tensor, expected: torch.dtype | None = None) -> str | None:
    """Describe why a tensor of a file is not valid for its name, None if it is.

    Args:
        name: name of the tensor.
        tensor: tensor of the file.
        expected: dtype in the network; None to infer from the name whether it is an integer.
    """
    if expected is None:
        expected = torch.int64 if INTEGER.search(name) else torch.float32
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype.startswith("float8"):
        return f"{name} is {dtype}, which has no meaning without its scales; save it as bfloat16"
    if tensor.is_floating_point() != expected.is_floating_point or (
        tensor.is_floating_point() and tensor.dtype not in FLOATS
    ):
        required = str(expected).removeprefix("torch.")
        return f"{name} is {dtype} in the file, where {required} is expected"
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
        # Cropping the zeros of an earlier padding loses nothing.
        if KERNEL.match(name) and resized.count_nonzero() < tensor.count_nonzero():
            fit.cropped.append(name)
        tensor = resized
    fit.tensors[name] = tensor


def _resized(name: str, tensor: Tensor, target: Tensor) -> Tensor | None:
    """Resize a kernel or the stem to the shape of the target; return None for other tensors."""
    if tensor.ndim != 4 or target.ndim != 4:
        return None
    if KERNEL.match(name) and tensor.shape[:2] == target.shape[:2]:
        return resize_kernel(tensor, target.shape[-1])
    same = tensor.shape[0] == target.shape[0] and tensor.shape[2:] == target.shape[2:]
    if name == STEM and same and 0 not in tensor.shape:
        return resize_image_channels(tensor, target.shape[1])
    return None


def drop_rule(name: str, target: State) -> str | None:
    """Return the rule by which a name that the network does not have is dropped, or None.

    A backbone has no classifier, and only the stages, downsamplings and output norms that its
    ``out_features`` need.
    """
    if CLASSIFIER.match(name):
        return "classifier"
    if MASKED_IMAGES.match(name):
        return f"{'token' if name == 'mask_token' else 'decoder'} of masked image modeling"
    if OUTPUT_NORM.match(name):
        return "norm of an unused output"
    stage = re.match(r"layers\.(\d+)\.(downsample\.)?", name)
    last = max((int(n.split(".")[1]) for n in target if n.startswith("layers.")), default=-1)
    if stage is None or last < 0:
        return None
    index = int(stage[1])
    if index > last or (index == last and stage[2] is not None):
        return "unused stage"
    return None


def _fit_levels(
    tensors: dict[str, Tensor], target: State, mode: str | None, normalized: bool, fit: Fit
) -> dict[str, Tensor]:
    """Resize every modulation of the file to the number of levels in the target."""
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
            continue  # damaged: `fit_backbone` reports what is missing
        if mode is None or (mode == "shrink") != (new < old):
            fit.problems.append(_level_problem(module, old, new, mode))
            return tensors
        present = [kernel for kernel in kernels if kernel is not None]
        sizes = [target[f"{module}focal_layers.{k}.0.weight"].shape[-1] for k in range(new)]
        _resize_levels(tensors, module, present, sizes, mode, fit)
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
        return f'{text}, which levels="{mode}" does not support'
    if new < old:
        return f'{text}; levels="shrink" drops the last ones and measures the effect'
    return (
        f'{text}; levels="preserving" adds levels without changing the outputs, levels="official" '
        "as the official code does"
    )


def _resize_levels(
    tensors: dict[str, Tensor],
    module: str,
    kernels: list[Tensor],
    sizes: list[int],
    mode: str,
    fit: Fit,
) -> None:
    """Resize gates and kernels of one modulation to ``len(sizes)`` levels, in place."""
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
    """Return the old level that each new one gets its weights from, by index or kernel size."""
    if mode == "by_kernel":
        return [old.index(size) if size in old else None for size in new]
    return [k if k < len(old) else None for k in range(len(new))]
