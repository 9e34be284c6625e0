"""What tools/train_net.py does: from command-line arguments to a finished run."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..checkpoint import load_initial_weights
from ..compat import create_local_process_group
from ..data.datasets import register_shapes
from ..data.panoptic_sets import (
    register_ade20k_panoptic,
    register_coco_panoptic,
    register_shapes_panoptic,
)
from ..data.semantic import register_ade20k_sem_seg, register_shapes_sem_seg
from .evaluate import evaluate, write_reports
from .experiment import Experiment, load_config, read_experiment
from .own_data import coco_files, use_coco_json
from .own_labels import folder_pairs, use_label_folders
from .own_panoptic import panoptic_sets, use_panoptic_sets
from .pictures import save_predictions
from .run import start_run
from .scaling import scale_learning_rate
from .train import autocast, train

logger = logging.getLogger("focalnet_det")


@dataclass(kw_only=True)
class RunArguments:
    """The command line of tools/train_net.py; see its ``--help``."""

    config_file: str
    opts: list[str] = field(default_factory=list)
    resume: bool = False
    eval_only: bool = False
    output: str | None = None
    report: bool = False
    coco_json: Sequence[str] = ()
    images: Sequence[str] = ()
    val_json: Sequence[str] = ()
    val_images: Sequence[str] = ()
    panoptic_json: Sequence[str] = ()
    panoptic_root: Sequence[str] = ()
    val_panoptic_json: Sequence[str] = ()
    val_panoptic_root: Sequence[str] = ()
    sem_images: Sequence[str] = ()
    sem_labels: Sequence[str] = ()
    val_sem_images: Sequence[str] = ()
    val_sem_labels: Sequence[str] = ()
    classes: str | None = None
    first_label: int | None = None
    num_gpus: int = 1
    num_cpus: int = 0
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"


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


def register_all() -> None:
    """Registers every data set that configs name."""
    register_shapes()
    register_shapes_sem_seg()
    register_ade20k_sem_seg()
    register_shapes_panoptic()
    register_coco_panoptic()
    register_ade20k_panoptic()


def run(args: RunArguments) -> dict[str, Any]:
    """Trains, or evaluates the initial weights; returns the results of the last evaluation."""
    register_all()
    cfg = load_config(args.config_file, args.opts)
    scale_learning_rate(cfg, args.opts)
    if args.coco_json or args.val_json:
        use_coco_json(
            cfg,
            train=coco_files("coco-json", args.coco_json, args.images, ()),
            val=coco_files("val-json", args.val_json, args.val_images, args.images),
            overrides=args.opts,
        )
    if args.panoptic_json or args.val_panoptic_json:
        use_panoptic_sets(
            cfg,
            train=panoptic_sets("", args.panoptic_json, args.panoptic_root, args.images),
            val=panoptic_sets(
                "val-", args.val_panoptic_json, args.val_panoptic_root, args.val_images
            ),
            overrides=args.opts,
        )
    if args.sem_images or args.sem_labels or args.val_sem_images or args.val_sem_labels:
        use_label_folders(
            cfg,
            train=folder_pairs("sem", args.sem_images, args.sem_labels),
            val=folder_pairs("val-sem", args.val_sem_images, args.val_sem_labels),
            classes=args.classes,
            first_label=args.first_label,
            overrides=args.opts,
        )
    if args.output:
        set_output(cfg, args.output)
    if args.report:
        ask_for_report(cfg)
    experiment = read_experiment(cfg)
    start_run(experiment)
    if args.eval_only:
        return run_evaluation(experiment)
    return train(experiment, resume=args.resume)


def run_evaluation(experiment: Experiment) -> dict[str, Any]:
    """Evaluates ``init_checkpoint``.

    Raises: ValueError if there is none or it does not fit.
    """
    options = experiment.options
    if not options.init_checkpoint:
        raise ValueError(
            "--eval-only needs weights: add train.init_checkpoint=FILE (.py config) or "
            "MODEL.WEIGHTS FILE (.yaml config)."
        )
    model = experiment.model()
    report = load_initial_weights(model, options.init_checkpoint, new_classes=False)
    logger.info("%s", report)
    model.to(options.device)
    with autocast(options):
        results = evaluate(experiment, model)
    if comm.is_main_process():
        save_predictions(experiment, model)
        write_reports(experiment, results, Path(options.init_checkpoint).name)
    return results


def ask_for_report(cfg: CfgNode | DictConfig) -> None:
    """Switches the HTML page on in a config of either kind."""
    if isinstance(cfg, CfgNode):
        cfg.TEST.REPORT = True
    else:
        cfg.train.report = True


def set_output(cfg: CfgNode | DictConfig, folder: str) -> None:
    """Sets the output folder of a config of either kind."""
    if isinstance(cfg, CfgNode):
        cfg.OUTPUT_DIR = folder
    else:
        cfg.train.output_dir = folder
