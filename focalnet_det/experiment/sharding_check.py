"""Checks of ``train.sharding``: what cannot be combined with it."""

from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..compat import find_fully_shard
from ..layers.sync_batch_norm import DistributedBatchNorm
from .description import Experiment

# Their statistics are those of all processes.
SYNCHRONIZED = (nn.SyncBatchNorm, DistributedBatchNorm, NaiveSyncBatchNorm)


def sharding_problems(experiment: Experiment, model: nn.Module) -> list[str]:
    """Return options and modules that a sharded training cannot have, a sentence each."""
    options, key = experiment.options, experiment.given.key
    if not options.sharding:
        return []
    name, found = key("sharding"), []
    if find_fully_shard() is None:
        found.append(f"{name}=fsdp needs PyTorch 2.6 or newer.")
    if comm.get_world_size() == 1:
        found.append(
            f"{name}=fsdp shards a model over several processes, but this run has one: use "
            "--num-gpus, --num-cpus or torchrun, or leave it empty."
        )
    if options.ddp:
        found.append(
            f"{key('ddp')} has no effect with {name}=fsdp, which takes the place of "
            "DistributedDataParallel: leave one of them empty."
        )
    if options.init_levels == "preserving":
        found.append(
            f"{key('init_levels')} preserving replaces modules while it trains, which {name}=fsdp "
            "does not allow: grow the network without sharding first."
        )
    unsynchronized = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, SYNCHRONIZED)
    ]
    if unsynchronized:
        found.append(
            f"{unsynchronized[0]} is a batch norm with statistics of its own in each process, of "
            f"which {name}=fsdp would keep those of the first: use GN or SyncBN."
        )
    return found
