"""Start the processes of a run: one, one per GPU, several on the CPU, or those of torchrun."""

import os
from dataclasses import replace

import torch
from detectron2.engine import launch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..compat import create_local_process_group
from .main import RunArguments, run


def launch_run(args: RunArguments) -> None:
    """Runs in this process, or in one process per GPU, or in several processes on the CPU.

    Under torchrun this process is one of those that it started, and nothing more is launched.

    Raises: ValueError if there are fewer GPUs than asked for.
    """
    if torch.distributed.is_torchelastic_launched():
        run_under_torchrun(args)
        return
    found = torch.cuda.device_count()
    if args.num_gpus > max(found, 1):
        raise ValueError(
            f"--num-gpus {args.num_gpus}, but PyTorch sees {found} GPUs here. "
            "Use --num-cpus for several processes on the CPU."
        )
    if args.num_cpus > 1:
        if found:
            raise ValueError("--num-cpus is for machines without a GPU; hide it first.")
        # Processes that share cores are several times slower with more threads than cores.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.num_cpus))
    # What Detectron2 says while a child process imports it; the parent has heard it already.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    launch(
        run_launched,
        max(args.num_gpus, args.num_cpus),
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def run_launched(args: RunArguments) -> None:
    """Runs as a process that Detectron2's ``launch`` has started, or as the only one."""
    try:
        run(args)
    finally:
        if torch.distributed.is_initialized():
            # Detectron2 leaves the group to the exit of the process, where gloo's threads, if they
            # still run, abort it.
            torch.distributed.destroy_process_group()


def run_under_torchrun(args: RunArguments) -> None:
    """Runs as the process that torchrun's environment variables describe.

    After torchrun has restarted the processes, because one of them died, training continues from
    the last checkpoint.

    Raises: ValueError if processes are launched in two ways at once, or there are too few GPUs.
    """
    if args.num_gpus > 1 or args.num_cpus > 1 or args.num_machines > 1:
        raise ValueError(
            "torchrun starts the processes: leave out --num-gpus, --num-cpus and --num-machines."
        )
    local_rank, on_this_machine = (int(os.environ[k]) for k in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count()
    if 0 < gpus < on_this_machine:
        raise ValueError(f"torchrun starts {on_this_machine} processes, PyTorch sees {gpus} GPUs.")
    if gpus:
        torch.cuda.set_device(local_rank)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # torchrun may keep its store over a restart: without a prefix of their own, the new processes
    # would find the addresses of the dead ones there.
    store, rank, world_size = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        "nccl" if gpus else "gloo",
        store=PrefixStore(f"restart_{restarts}", store),
        rank=rank,
        world_size=world_size,
    )
    try:
        create_local_process_group(on_this_machine)
        run(replace(args, resume=args.resume or restarts > 0))
    finally:
        torch.distributed.destroy_process_group()
