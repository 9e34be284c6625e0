"""Evaluation of a model on the test sets of an experiment."""

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import nn

from ..evaluation import build_evaluator
from ..heads.tta import TestTimeAugmentation
from .experiment import Experiment

logger = logging.getLogger("focalnet_det")


def evaluate(experiment: Experiment, model: nn.Module) -> dict[str, Any]:
    """Evaluates on every test set, prints the tables and writes the results.

    Args:
        experiment: names the test sets.
        model: in any mode; it is put back into it.
    Returns: {data set: {task: {metric: value in percent}}}; empty on all but the first process.
    """
    results: dict[str, Any] = {}
    for name, build_loader in experiment.test_loaders.items():
        folder = Path(experiment.options.output_dir) / "evaluation" / name
        logger.info("Evaluating on %s.", name)
        evaluator = build_evaluator(
            name,
            output_dir=folder,
            max_dets=experiment.options.max_dets,
            save_predictions=experiment.options.save_predictions,
            boundary=experiment.options.boundary_ap,
        )
        # A loader takes a number from the model's generator: the training must not notice.
        with torch.random.fork_rng(devices=[]):
            result = inference_on_dataset(TestTimeAugmentation(model), build_loader(), evaluator)
        if comm.is_main_process():
            results[name] = result
    return results
