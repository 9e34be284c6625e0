"""Gradients of a batch that two processes share, and of one process."""

from pathlib import Path

import torch
from torch import distributed

from tests.helpers.compare import relative_error
from tests.helpers.nano_recipes import build, record
from tests.helpers.processes import in_two_processes

# Process 0 has an image with objects, process 1 one without.
OBJECTS = (2, 0)


def save_shared_gradients(rank: int, method: str, folder: str) -> None:
    """Save the gradients of this process's image, averaged over the processes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        torch.manual_seed(0)
        model = build(method).train()
        sum(model([record(OBJECTS[rank], seed=rank)]).values()).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
        if rank == 0:
            torch.save({n: p.grad for n, p in model.named_parameters()}, f"{folder}/grads.pth")
    finally:
        distributed.destroy_process_group()


def assert_two_processes_equal_one(method: str, folder: Path) -> None:
    """Compare with the gradients of both images in a batch of one process."""
    in_two_processes("tests.helpers.shared_gradients", "save_shared_gradients", method, folder)
    torch.manual_seed(0)
    model = build(method).train()
    sum(model([record(n, seed=rank) for rank, n in enumerate(OBJECTS)]).values()).backward()
    shared = torch.load(folder / "grads.pth", weights_only=True)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert shared[name] is None
        else:
            assert relative_error(shared[name], parameter.grad) < 1e-3, name
