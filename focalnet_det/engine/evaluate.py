"""Evaluation of a model on the test sets of an experiment."""

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
    """What the evaluation on a test set writes."""
    return Path(options.output_dir) / "evaluation" / name


def write_reports(experiment: Experiment, results: Mapping[str, Any], weights: str) -> None:
    """Writes ``report.html`` for every test set, if the options ask for it; in the first process.

    Args:
        results: of :func:`evaluate`.
        weights: what was evaluated, in words.
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
    """Evaluate on every test set, print the tables and write the results.

    Args:
        experiment: names the test sets.
        model: in any mode; it is put back into it.
        between: called before each image; what it raises ends the evaluation.
    Returns: {dataset: {task: {metric: value in percent}}}; empty on all but the first process.
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
        # A loader takes a number from the model's generator: the training must not notice.
        with torch.random.fork_rng(devices=[]):
            tested = TestTimeAugmentation(model)
            tested.register_forward_pre_hook(lambda *_: between())
            result = inference_on_dataset(tested, build_loader(), evaluator)
        if comm.is_main_process():
            results[name] = result
    return results
