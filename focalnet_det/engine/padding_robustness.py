"""Evaluate a detector with additional batch padding."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..analysis.feature_shifts import extra_padding
from ..checkpoint import load_initial_weights
from ..experiment import Experiment, RunArguments, describe
from ..heads.mmdet.segmentor import MmsegSegmentor
from .evaluate import evaluate


def weighted_model(config_file: str, weights: str | None) -> tuple[Experiment, nn.Module]:
    """Build experiment and model of a config, with weights of a complete detector or random ones.

    Raises: ValueError if the weights do not match the model.
    """
    experiment = describe(RunArguments(config_file=config_file))
    model = experiment.model().to(experiment.options.device)
    if weights:
        load_initial_weights(model, weights, new_classes=False)
    return experiment, model


def scores_under_padding(
    experiment: Experiment, model: nn.Module, paddings: Sequence[int]
) -> list[dict[str, Any]]:
    """Evaluate AP of each test set and task, without and with each padding.

    Args:
        experiment: provides the test sets.
        model: detector.
        paddings: pixels.
    Raises: ValueError for a model that never pads.
    """
    if isinstance(model, MmsegSegmentor):
        raise ValueError("This segmentor evaluates images without padding, so nothing can change.")
    rows = []
    for pixels in [0, *(p for p in paddings if p)]:
        with extra_padding(model, pixels) if pixels else nullcontext():
            results = evaluate(experiment, model)
        rows += [
            {"data": data, "task": task, "pixels": pixels, "AP": metrics["AP"]}
            for data, tasks in results.items()
            for task, metrics in tasks.items()
            if "AP" in metrics
        ]
    return rows
