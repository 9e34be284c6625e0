"""Shard parameters, gradients and optimizer state over all processes, by PyTorch's FSDP.

Checkpoints stay whole: a run may go on with sharding or without it, in any number of processes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from detectron2.utils import comm
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from ..backbones.stages import Stage
from ..compat import find_fully_shard


def shard_model(model: nn.Module) -> None:
    """Shard a model in place; its processes begin with the weights of the first one.

    Each block of a focal network is gathered when it runs, and the rest of the model as one.
    Collective: call it in all processes, before the optimizer is built.

    Args:
        model: already on its device.
    Raises: RuntimeError if PyTorch has no ``fully_shard``.
    Source: arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
    """
    fully_shard = find_fully_shard()
    if fully_shard is None:
        raise RuntimeError("Sharded training needs PyTorch 2.6 or newer.")
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    for tensor in tensors:
        distributed.broadcast(tensor, src=0)
    mesh = init_device_mesh(tensors[0].device.type, (comm.get_world_size(),))
    for stage in [module for module in model.modules() if isinstance(module, Stage)]:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_model` was called on a model."""
    return any(is_part(parameter) for parameter in model.parameters())


def is_part(value: Any) -> bool:
    """Return whether a value is a ``DTensor``, of which each process holds a part."""
    # Without an import, which takes long and fails in older versions.
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds; other tensors unchanged."""
    return cast(Any, tensor).to_local() if is_part(tensor) else tensor


def gathered(value: Any, *, everywhere: bool = False) -> Any:
    """Return state in which sharded tensors are whole, on the CPU. Collective if there are any.

    Args:
        value: nested containers with tensors, such as a state dict.
        everywhere: in all processes; otherwise sharded tensors are None in all but the first.
    """
    if is_part(value):
        whole = value.full_tensor()
        return whole.cpu() if everywhere or comm.is_main_process() else None
    if not has_parts(value):
        return value
    if isinstance(value, Mapping):
        return {key: gathered(item, everywhere=everywhere) for key, item in value.items()}
    return [gathered(item, everywhere=everywhere) for item in value]


def has_parts(value: Any) -> bool:
    """Return whether there are sharded tensors in nested containers."""
    if isinstance(value, Mapping):
        return any(has_parts(item) for item in value.values())
    return any(map(has_parts, value)) if isinstance(value, list | tuple) else is_part(value)


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """Return this process's part of a whole tensor if the target is sharded, else the tensor.

    Args:
        value: equal in all processes; scalars stay whole.
    """
    if not is_part(target) or value.shape != target.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    # Every process has the whole tensor already: nothing is sent.
    return distribute_tensor(
        value.to(target.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors, equal in all processes, sharded or not."""
    targets = module.state_dict()
    module.load_state_dict({k: sharded_like(v, targets[k]) for k, v in state.items()})


def shard_moments(saved: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Return the state of an optimizer with its tensors sharded as the parameters are.

    Args:
        saved: state dict of an optimizer, with whole tensors.
        parameters: of the optimizer, in the order of its groups.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = dict(saved["state"])
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state:
            state[number] = {
                name: sharded_like(value, parameter) if isinstance(value, Tensor) else value
                for name, value in state[number].items()
            }
    return {**saved, "state": state}


def whole_copy(model: nn.Module, build: Callable[[], nn.Module], device: str) -> nn.Module:
    """Return an ordinary model with the weights of a sharded one. Collective.

    A sharded model needs all processes in every call, which evaluate different numbers of images.

    Args:
        model: sharded.
        build: builds a model of the same architecture; random states do not change.
        device: of the copy.
    """
    with torch.random.fork_rng(devices=[]):
        copy = build()
    copy.load_state_dict(gathered(model.state_dict(), everywhere=True))
    return copy.to(device)
