"""Out of memory: what takes most, and which options need less."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..experiment import TrainOptions

GIB = 2**30
OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError)
# As PyTorch's CPU allocators put it.
CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return any(message in str(error) for message in CPU_MESSAGES)


def explain_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Mapping[str, Any]],
    options: TrainOptions,
) -> str:
    """Say in one paragraph what takes memory and which options reduce it.

    Args:
        model, optimizer: of the training.
        data: the examples of the iteration that ran out of memory.
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
        text += f", up to {objects} objects in an image"
    remedies = []
    if len(data) > options.accumulation:
        remedies.append(f"train.accumulation={len(data)} (one image at a time)")
    if any(_switches(model)):
        remedies.append(
            "activation checkpointing (activation_checkpointing=true on the backbone, or "
            "train.oom_retry=true to switch it on when memory runs out)"
        )
    if options.precision == "fp32":
        remedies.append("train.precision=bf16")
    remedies.append("a smaller batch, crop or image size")
    return f"{text}. Options that need less: {'; '.join(remedies)}."


def checkpoint_activations(model: nn.Module) -> bool:
    """Switch activation checkpointing on wherever a model has it; return whether that is news."""
    changed = False
    for module in _switches(model):
        module.activation_checkpointing = True  # type: ignore[assignment]
        changed = True
    return changed


def _switches(model: nn.Module) -> Iterable[nn.Module]:
    """Yield the modules whose activation checkpointing is off."""
    for module in model.modules():
        if getattr(module, "activation_checkpointing", None) is False:
            yield module


def _gib(tensors: Iterable[Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / GIB
