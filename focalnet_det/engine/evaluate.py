"""Evaluate a model on the test sets of an experiment."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import nn

from ..evaluation import build_evaluator
from ..experiment import Experiment, TrainOptions
from ..heads.tta import TestTimeAugmentation
from ..report import write_report

logger = logging.getLogger("focalnet_det")


def evaluation_folder(options: TrainOptions, name: str) -> Path:
    """Return the output folder of the evaluation on a test set."""
    return Path(options.output_dir) / "evaluation" / name


def write_reports(experiment: Experiment, results: Mapping[str, Any], weights: str) -> None:
    """Write ``report.html`` for each test set if enabled. Call it in the main process only.

    Args:
        experiment: provides the options.
        results: of :func:`evaluate`.
        weights: description of the evaluated checkpoint.
    """
    options = experiment.options
    for name, tasks in results.items() if options.report else ():
        write_report(
            name,
            tasks,
            evaluation_folder(options, name),
            weights=weights,
            max_dets=options.max_dets,
            run=Path(options.output_dir),
        )


def evaluate(
    experiment: Experiment, model: nn.Module, *, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Evaluate on every test set, log the tables and write the results.

    Args:
        experiment: provides the test sets.
        model: in any mode, which is restored.
        between: called before each image; exceptions end the evaluation.
    Returns: {dataset: {task: {metric: percent}}}; empty on all but the main process.
    """
    results: dict[str, Any] = {}
    options = experiment.options
    for name, build_loader in experiment.test_loaders.items():
        folder = evaluation_folder(options, name)
        logger.info("Evaluating on %s.", name)
        evaluator = build_evaluator(
            name,
            output_dir=folder,
            max_dets=options.max_dets,
            save_predictions=options.save_predictions or options.report,
            boundary=options.boundary_ap,
        )
        # Creating a loader iterator draws from the global generator, which training uses.
        with torch.random.fork_rng(devices=[]):
            tested = TestTimeAugmentation(model)
            tested.register_forward_pre_hook(lambda *_: between())
            result = inference_on_dataset(tested, build_loader(), evaluator)
        if comm.is_main_process():
            results[name] = result
    return results
