"""Explain out-of-memory errors, and which options reduce memory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..experiment import TrainOptions
from .sharding import local_part

GIB = 2**30
OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError)
# Messages of PyTorch's CPU allocators, which raise RuntimeError.
CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on a GPU or the CPU."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return any(message in str(error) for message in CPU_MESSAGES)


def explain_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Mapping[str, Any]],
    options: TrainOptions,
) -> str:
    """Describe in one paragraph what uses memory, and which options reduce it.

    Args:
        model, optimizer: of the training.
        data: the samples of the failed iteration.
        options: of the training.
    """
    weights = _gib(model.state_dict().values())
    moments = _gib(
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
    )
    sizes = [tuple(e["image"].shape[-2:]) for e in data if e["image"].dim() == 3]
    objects = max((len(e["instances"]) for e in data if "instances" in e), default=0)
    parts = len(data) // options.accumulation or 1
    text = (
        f"Out of memory: weights take {weights:.1f} GiB, gradients about as much, the optimizer "
        f"{moments:.1f} GiB; the rest is activations of {parts} image(s) at a time"
    )
    if sizes:
        height, width = max(sizes, key=lambda s: s[0] * s[1])
        text += f", the largest {height} x {width} pixels"
    if objects:
        text += f", up to {objects} objects per image"
    return f"{text}. To reduce memory, use {'; '.join(_remedies(model, len(data), options))}."


def _remedies(model: nn.Module, num_images: int, options: TrainOptions) -> list[str]:
    """Return the options that reduce the memory of a training, least costly first."""
    remedies = []
    if num_images > options.accumulation:
        remedies.append(f"train.accumulation={num_images} (one image at a time)")
    if any(_switches(model)):
        remedies.append(
            "activation checkpointing (activation_checkpointing=true on the backbone, or "
            "train.oom_retry=true to enable it on demand)"
        )
    if options.precision == "fp32":
        remedies.append("train.precision=bf16")
    if not options.sharding and comm.get_world_size() > 1:
        remedies.append("train.sharding=fsdp")
    return [*remedies, "a smaller batch, crop or image size"]


def checkpoint_activations(model: nn.Module) -> bool:
    """Enable activation checkpointing in all modules; return whether anything changed."""
    changed = False
    for module in _switches(model):
        module.activation_checkpointing = True  # type: ignore[assignment]
        changed = True
    return changed


def _switches(model: nn.Module) -> Iterable[nn.Module]:
    """Yield the modules whose activation checkpointing is disabled."""
    for module in model.modules():
        if getattr(module, "activation_checkpointing", None) is False:
            yield module


def _gib(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in map(local_part, tensors)) / GIB
