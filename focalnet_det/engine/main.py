"""What tools/train_net.py does: from command-line arguments to a finished run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig

from ..checkpoint import load_initial_weights
from ..data.datasets import register_shapes
from ..data.panoptic_sets import (
    register_ade20k_panoptic,
    register_coco_panoptic,
    register_shapes_panoptic,
)
from ..data.semantic import register_ade20k_sem_seg, register_shapes_sem_seg
from .evaluate import evaluate, write_reports
from .experiment import Experiment, load_config, read_experiment
from .logs import hold_records
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
    hold_records()
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
    start_run(experiment, evaluation_only=args.eval_only)
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
