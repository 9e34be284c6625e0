"""Launch the processes of a run: one, one per GPU, several on the CPU, or those of torchrun."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..compat import create_local_process_group
from ..supervise import exit_on_early_signal, run_processes
from .main import RunArguments, run

# Timeout of collective calls, as in Detectron2.
TIMEOUT = timedelta(minutes=30)
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def launch_run(args: RunArguments) -> None:
    """Run in this process, in one process per GPU, or in several processes on the CPU.

    Under torchrun, this process is one of the workers, and no others are launched.

    Raises: ValueError if the arguments contradict each other or this machine; SystemExit with the
        exit code of the processes if there are several and not all succeed.
    """
    if distributed.is_torchelastic_launched():
        run_under_torchrun(args)
        return
    check_counts(args)
    if args.num_cpus > 1:
        # Oversubscribing the cores would slow the processes down several times.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.num_cpus))
    per_machine = max(args.num_gpus, args.num_cpus)
    if per_machine * args.num_machines == 1:
        with exit_on_early_signal():
            run(args)
        return
    # Suppress import warnings that the parent has already shown, and those of the resource tracker
    # after a process was killed.
    os.environ.setdefault(
        "PYTHONWARNINGS", "ignore::FutureWarning,ignore:resource_tracker:UserWarning"
    )
    url = f"tcp://127.0.0.1:{free_port()}" if args.dist_url == "auto" else args.dist_url
    job = Job(args, per_machine, url)
    run_processes(
        run_spawned,
        job,
        per_machine,
        first_rank=args.machine_rank * per_machine,
        world_size=args.num_machines * per_machine,
    )


def check_counts(args: RunArguments) -> None:
    """Check the requested numbers of processes and machines.

    Raises: ValueError with the invalid argument.
    """
    if args.num_gpus < 0 or args.num_cpus < 0 or args.num_machines < 1:
        raise ValueError(
            f"--num-gpus {args.num_gpus}, --num-cpus {args.num_cpus}, --num-machines "
            f"{args.num_machines}: counts cannot be negative, and at least one machine is needed."
        )
    if args.num_gpus > 1 and args.num_cpus > 0:
        raise ValueError("--num-gpus and --num-cpus are mutually exclusive.")
    available = torch.cuda.device_count()
    if args.num_gpus > max(available, 1):
        raise ValueError(
            f"--num-gpus {args.num_gpus}, but PyTorch finds {available} GPUs. "
            "Use --num-cpus for several processes on the CPU."
        )
    if args.num_cpus > 1 and available:
        raise ValueError(
            "--num-cpus is for machines without a GPU. Hide the GPUs with CUDA_VISIBLE_DEVICES=."
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank {args.machine_rank} is out of range; with --num-machines "
            f"{args.num_machines}, ranks are 0 to {args.num_machines - 1}."
        )
    if args.dist_url != "auto" or args.num_machines > 1:
        check_url(args)


def check_url(args: RunArguments) -> None:
    """Check the rendezvous address.

    Raises: ValueError if it is missing for several machines or malformed, or its port is in use.
    """
    url = args.dist_url
    if url == "auto":
        raise ValueError(
            "Multi-machine training requires --dist-url tcp://HOST:PORT with the name and a free "
            "port of the first machine, equal on all machines."
        )
    address = re.fullmatch(r"tcp://(\[.+\]|[^:/]+):(\d+)", url)
    if address is None or not 0 < int(address[2]) < 65536:
        raise ValueError(f"--dist-url {url} does not have the form tcp://HOST:PORT.")
    if args.machine_rank == 0 and is_in_use(int(address[2])):
        raise ValueError(f"--dist-url {url}: the port is in use on this machine. Choose another.")


def is_in_use(port: int) -> bool:
    """Return whether another process of this machine listens on a port."""
    with socket.socket() as probe:
        # As PyTorch does, so that closing connections of an earlier run do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Job:
    """Arguments of every spawned process.

    Attributes:
        args: of the run.
        per_machine: number of processes per machine.
        url: rendezvous address.
    """

    args: RunArguments
    per_machine: int
    url: str


def run_spawned(local_rank: int, job: Job) -> None:
    """Run as one of the spawned processes."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    distributed.init_process_group(
        backend(),
        init_method=job.url,
        world_size=job.per_machine * job.args.num_machines,
        rank=job.args.machine_rank * job.per_machine + local_rank,
        timeout=TIMEOUT,
    )
    create_local_process_group(job.per_machine)
    run(job.args)


def backend() -> str:
    """Return the name of the distributed backend for the devices of this machine."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def torchrun_variables() -> dict[str, int]:
    """Return the environment variables that torchrun sets for this process.

    Raises: ValueError with the missing or invalid variables.
    """
    wrong = [
        f"{name}={os.environ.get(name, '(missing)')}"
        for name in TORCHRUN_VARIABLES
        if not os.environ.get(name, "").isdecimal()
    ]
    if "MASTER_ADDR" not in os.environ:
        wrong.append("MASTER_ADDR=(missing)")
    if wrong:
        raise ValueError(
            f"TORCHELASTIC_RUN_ID indicates torchrun, but {', '.join(wrong)}. "
            "Start it with torchrun, or unset TORCHELASTIC_RUN_ID."
        )
    return {name: int(os.environ[name]) for name in TORCHRUN_VARIABLES}


def run_under_torchrun(args: RunArguments) -> None:
    """Run as a worker of torchrun.

    After a restart of the workers, training resumes from the last checkpoint.

    Raises: ValueError if the arguments request more processes, or there are too few GPUs.
    """
    if args.num_gpus > 1 or args.num_cpus > 1 or args.num_machines > 1:
        raise ValueError(
            "torchrun launches the processes. Remove --num-gpus, --num-cpus and --num-machines."
        )
    variables = torchrun_variables()
    local_world_size = variables["LOCAL_WORLD_SIZE"]
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_world_size:
        raise ValueError(
            f"torchrun launched {local_world_size} processes, but PyTorch finds {gpus} GPUs."
        )
    if gpus:
        torch.cuda.set_device(variables["LOCAL_RANK"])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # torchrun may reuse its store after a restart. A prefix keeps the new processes from reading
    # the addresses of the dead ones.
    store, rank, world_size = next(rendezvous("env://"))
    distributed.init_process_group(
        backend(),
        store=PrefixStore(f"restart_{restarts}", store),
        rank=rank,
        world_size=world_size,
    )
    with leaving_group(), exit_on_early_signal():
        create_local_process_group(local_world_size)
        run(after_restart(args) if restarts else args)


def after_restart(args: RunArguments) -> RunArguments:
    """Return the arguments to resume a run after a restart."""
    return replace(args, resume=not args.eval_only, overwrite=False)


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """Destroy the process group at the end of the block.

    Otherwise, running threads of gloo abort the process at exit.
    """
    try:
        yield
    finally:
        distributed.destroy_process_group()
