"""Start the processes of a run: one, one per GPU, several on the CPU, or those of torchrun."""

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

# How long a collective waits for a process that is alive, as Detectron2 does.
TIMEOUT = timedelta(minutes=30)
TORCHRUN_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def launch_run(args: RunArguments) -> None:
    """Run in this process, or in one process per GPU, or in several processes on the CPU.

    Under torchrun this process is one of those that it started, and nothing more is launched.

    Raises: ValueError if the arguments contradict each other or this machine; SystemExit with the
        code of the processes if there are several and they did not all succeed.
    """
    if distributed.is_torchelastic_launched():
        run_under_torchrun(args)
        return
    check_counts(args)
    if args.num_cpus > 1:
        # Processes that share cores are several times slower with more threads than cores.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.num_cpus))
    per_machine = max(args.num_gpus, args.num_cpus)
    if per_machine * args.num_machines == 1:
        with exit_on_early_signal():
            run(args)
        return
    # What libraries say while a child process imports them, which the parent has heard already; and
    # what Python says when it clears up after a process that was killed.
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
    """Check how many processes and machines are asked for, before any is started.

    Raises: ValueError that says which argument cannot be.
    """
    if args.num_gpus < 0 or args.num_cpus < 0 or args.num_machines < 1:
        raise ValueError(
            f"--num-gpus {args.num_gpus}, --num-cpus {args.num_cpus}, --num-machines "
            f"{args.num_machines}: counts cannot be negative, and there is at least one machine."
        )
    if args.num_gpus > 1 and args.num_cpus > 0:
        raise ValueError("--num-gpus and --num-cpus exclude each other: leave one out.")
    found = torch.cuda.device_count()
    if args.num_gpus > max(found, 1):
        raise ValueError(
            f"--num-gpus {args.num_gpus}, but PyTorch sees {found} GPUs here. "
            "Use --num-cpus for several processes on the CPU."
        )
    if args.num_cpus > 1 and found:
        raise ValueError("--num-cpus is for machines without a GPU; hide it first.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank {args.machine_rank} of --num-machines {args.num_machines}: ranks "
            f"count from 0 to {args.num_machines - 1}."
        )
    if args.dist_url != "auto" or args.num_machines > 1:
        check_url(args)


def check_url(args: RunArguments) -> None:
    """Check the address at which the processes meet.

    Raises: ValueError if several machines have none, it is not one, or its port is in use here.
    """
    url = args.dist_url
    if url == "auto":
        raise ValueError(
            "Several machines need --dist-url tcp://HOST:PORT, with the first machine's name and "
            "a free port, the same on all of them."
        )
    address = re.fullmatch(r"tcp://(\[.+\]|[^:/]+):(\d+)", url)
    if address is None or not 0 < int(address[2]) < 65536:
        raise ValueError(f"--dist-url {url} is not of the form tcp://HOST:PORT.")
    if args.machine_rank == 0 and is_in_use(int(address[2])):
        raise ValueError(f"--dist-url {url}: the port is in use on this machine; choose another.")


def is_in_use(port: int) -> bool:
    """Whether another process of this machine listens on a port."""
    with socket.socket() as probe:
        # As PyTorch does: connections of an earlier run that are closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Job:
    """What every spawned process gets.

    Attributes:
        per_machine: number of processes on each machine.
        url: where they meet.
    """

    args: RunArguments
    per_machine: int
    url: str


def run_spawned(local_rank: int, job: Job) -> None:
    """Run as one of the processes that this machine has spawned."""
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
    """Return PyTorch's backend for the devices of this machine."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def torchrun_numbers() -> dict[str, int]:
    """Return the numbers that torchrun sets for this process.

    Raises: ValueError that names what is missing or is not a number.
    """
    wrong = [
        f"{name}={os.environ.get(name, '(missing)')}"
        for name in TORCHRUN_NUMBERS
        if not os.environ.get(name, "").isdecimal()
    ]
    if "MASTER_ADDR" not in os.environ:
        wrong.append("MASTER_ADDR=(missing)")
    if wrong:
        raise ValueError(
            f"The environment says that torchrun started this process, but {', '.join(wrong)}. "
            "Start it with torchrun, or unset TORCHELASTIC_RUN_ID."
        )
    return {name: int(os.environ[name]) for name in TORCHRUN_NUMBERS}


def run_under_torchrun(args: RunArguments) -> None:
    """Run as the process that torchrun's environment variables describe.

    After torchrun has restarted the processes, because one of them died, training continues from
    the last checkpoint.

    Raises: ValueError if processes are launched in two ways at once, or there are too few GPUs.
    """
    if args.num_gpus > 1 or args.num_cpus > 1 or args.num_machines > 1:
        raise ValueError(
            "torchrun starts the processes: leave out --num-gpus, --num-cpus and --num-machines."
        )
    numbers = torchrun_numbers()
    on_this_machine = numbers["LOCAL_WORLD_SIZE"]
    gpus = torch.cuda.device_count()
    if 0 < gpus < on_this_machine:
        raise ValueError(f"torchrun starts {on_this_machine} processes, PyTorch sees {gpus} GPUs.")
    if gpus:
        torch.cuda.set_device(numbers["LOCAL_RANK"])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # torchrun may keep its store over a restart: without a prefix of their own, the new processes
    # would find the addresses of the dead ones there.
    store, rank, world_size = next(rendezvous("env://"))
    distributed.init_process_group(
        backend(),
        store=PrefixStore(f"restart_{restarts}", store),
        rank=rank,
        world_size=world_size,
    )
    with leaving_group(), exit_on_early_signal():
        create_local_process_group(on_this_machine)
        run(after_restart(args) if restarts else args)


def after_restart(args: RunArguments) -> RunArguments:
    """Return the arguments for going on with what an earlier start has begun."""
    return replace(args, resume=not args.eval_only, overwrite=False)


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """Leave the process group at the end of the block.

    At the exit of the process gloo's threads, if they still run, abort it.
    """
    try:
        yield
    finally:
        distributed.destroy_process_group()
