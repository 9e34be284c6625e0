"""Detect NaN and infinity before they corrupt the weights, and save the iteration for replay."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor, nn

from ..atomic import replacing
from .sharding import local_part

logger = logging.getLogger("focalnet_det")

# Consecutive overflows with fp16 that are attributed to the search for the loss scale.
MAX_OVERFLOWS = 25

# Structure -> (pack, unpack), so that samples load without unpickling classes.
STRUCTURES = {
    "Boxes": (lambda x: x.tensor, Boxes),
    "BitMasks": (lambda x: x.tensor, BitMasks),
    "Keypoints": (lambda x: x.tensor, Keypoints),
    "PolygonMasks": (
        lambda x: [[part.tolist() for part in mask] for mask in x.polygons],
        PolygonMasks,
    ),
}


class NumericalTrouble(FloatingPointError):
    """Signal a loss or gradient that is not finite; the weights are not yet updated.

    Attributes:
        reason: description.
        iteration: counted from 0.
    """

    def __init__(self, reason: str, iteration: int) -> None:
        super().__init__(reason, iteration)
        self.reason = reason
        self.iteration = iteration

    def __str__(self) -> str:
        return self.reason


class Rewind(Exception):
    """Signal that training should return to the last checkpoint after NaN or infinity."""

    def __init__(self, trouble: NumericalTrouble) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients, a scalar tensor on their device; 0 without gradients.

    Collective if the parameters are sharded.
    """
    whole = [p.grad for p in parameters if p.grad is not None]
    if not whole:
        return torch.zeros(())
    gradients = [local_part(g) for g in whole]
    norms = torch._foreach_norm([g.float() if g.is_sparse else g for g in gradients])
    device = norms[0].device
    norm = torch.linalg.vector_norm(torch.stack([n.to(device, torch.float32) for n in norms]))
    if gradients[0] is whole[0]:
        return norm
    squared = norm.square()
    torch.distributed.all_reduce(squared)
    return squared.sqrt()


def first_not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, None if there is none."""
    for name, tensor in tensors:
        if tensor is None or not tensor.is_floating_point():
            continue
        if not local_part(tensor.detach()).isfinite().all():
            return name
    return None


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all floating-point tensors are finite, with one synchronization per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    return all(
        bool(torch.stack([torch.isfinite(t).all() for t in group]).all())
        for group in by_device.values()
    )


def describe_trouble(
    losses: Mapping[str, Tensor], model: nn.Module, data: Sequence[Mapping[str, Any]]
) -> str:
    """Describe which losses and gradients are not finite, and the images of the iteration.

    Args:
        losses: by name, in this process.
        model: with the gradients of the iteration.
        data: the samples of the iteration in this process.
    """
    bad = [f"{name} is {float(loss)}" for name, loss in losses.items() if not loss.isfinite()]
    gradients = ((name, p.grad) for name, p in model.named_parameters())
    first = first_not_finite(gradients)
    if first is not None:
        bad.append(
            f"the gradient of {first} is not finite" + ("" if len(bad) else " (the first one)")
        )
    weights = first_not_finite(model.named_parameters())
    if weights is not None:
        bad.append(f"the parameter {weights} itself is not finite")
    return f"{'; '.join(bad) or 'a gradient is not finite'}. {describe_images(data)}"


def describe_images(data: Sequence[Mapping[str, Any]]) -> str:
    """List the image files of samples."""
    names = [str(example.get("file_name", "?")) for example in data]
    return f"Images: {', '.join(names) or 'none'}"


def pack_example(example: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a sample to tensors, numbers, strings and plain containers."""
    return {key: _pack(value) for key, value in example.items()}


def _pack(value: Any) -> Any:
    kind = type(value).__name__
    if isinstance(value, Instances):
        fields = {name: _pack(field) for name, field in value.get_fields().items()}
        return {"Instances": list(value.image_size), "fields": fields}
    if kind in STRUCTURES:
        return {kind: STRUCTURES[kind][0](value)}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(k): _pack(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item) for item in value]
    return str(value)


def unpack_example(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Restore a sample from :func:`pack_example`."""
    return {key: _unpack(value) for key, value in packed.items()}


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if "Instances" in value:
            height, width = value["Instances"]
            fields = {name: _unpack(field) for name, field in value["fields"].items()}
            return Instances((height, width), **fields)
        if len(value) == 1 and next(iter(value)) in STRUCTURES:
            kind, content = next(iter(value.items()))
            return STRUCTURES[kind][1](content)
        return {key: _unpack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    return value


def write_trouble(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file for ``tools/replay_step.py``."""
    with replacing(path, durable=False) as temporary:
        torch.save(dict(content), temporary)
