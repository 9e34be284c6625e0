"""Load whole models: classifiers and masked image models here, detectors in ``load.py``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones.classifier import HEAD_NAMES, HeadedNetwork
from .fit import Fit, drop_rule, fit_backbone, value_problem
from .inspect import ambiguous_settings, normalizes_modulator
from .layouts.focal_transformer_names import SET_NAME, absent_neighbors, notes
from .layouts.translate import translate
from .load import (
    apply_fit,
    build_report,
    check_missing,
    explain_misfit,
    load_detector,
    new_level_kernels,
    open_checkpoint,
    raise_misfit,
)
from .load_report import LoadReport

CLASSES_22K, CLASSES_1K = 21842, 1000
NOTE_22K = (
    "The head has the first 1,000 classes of 22k, which are those of ImageNet-1k. Class 850 "
    "(n04399382, teddy bear) has no images in the published 22k training: it was never learned."
)


def load_initial_weights(
    model: nn.Module,
    path: str | Path | Mapping[str, Any],
    *,
    new_classes: bool = True,
    levels: str | None = None,
) -> LoadReport:
    """Initialize a model of a recipe: a detector, a segmentor, a classifier or a pretraining.

    Args:
        model: a ``HeadedNetwork``, or a Detectron2 model with a ``backbone``.
        path: file, URL, registered name or state dict.
        new_classes: begin anew what the file does not have for the task, such as a head for another
            number of classes; False, for evaluation, requires every tensor to fit.
        levels: what to do if the numbers of focal levels differ, see :func:`load_pretrained`.
    Returns: a report on every tensor.
    Raises: ValueError as :func:`load_pretrained`; nothing is loaded then.
    """
    load = load_headed if isinstance(model, HeadedNetwork) else load_detector
    return load(model, path, new_classes=new_classes, levels=levels)


def load_headed(
    net: nn.Module,
    weights: str | Path | Mapping[str, Any],
    *,
    new_classes: bool = True,
    levels: str | None = None,
) -> LoadReport:
    """Load a classifier or a masked image model from a file in any public layout.

    Of a head for ImageNet-22k, a classifier of 1,000 classes takes those of ImageNet-1k.

    Args:
        net: a ``HeadedNetwork``.
        weights, new_classes, levels: see :func:`load_initial_weights`.
    Raises: as there.
    """
    assert isinstance(net, HeadedNetwork)
    checkpoint = open_checkpoint(weights)
    translation = translate(checkpoint.tensors)
    heads = {n: t for n, t in translation.backbone.items() if _is_head(n)}
    inside = {n: t for n, t in translation.backbone.items() if not _is_head(n)}
    target = net.backbone.state_dict()
    fit = fit_backbone(inside, target, levels=levels, normalized=normalizes_modulator(net))
    fit.problems += [f"{name} is not in the network" for name in translation.unknown]
    absent = absent_neighbors(inside, target)
    initial = [*new_level_kernels(target, fit, levels), *absent, *filter(SET_NAME.match, target)]
    new, share = check_missing(fit, target, initial, False, 0.95)
    fitted = _fit_head(heads, net, new_classes)
    fit.problems += fitted.problems
    if fit.problems:
        explanation = explain_misfit(checkpoint.tensors, translation, net.backbone)
        raise_misfit(fit.problems, checkpoint.origin, explanation)
    fit.dropped |= fitted.dropped
    report = build_report(translation, fit)
    apply_fit(net.backbone, fit, report)
    net.load_state_dict(fitted.tensors, strict=False)
    report.loaded += [name for name in fitted.tensors if name not in fitted.resized]
    report.resized += list(fitted.resized)
    own = [name for name in net.state_dict() if _is_head(name)]
    report.missing = new + [name for name in own if name not in fitted.tensors]
    report.share = share
    report.notes += ambiguous_settings(inside, net.backbone) + notes(net.backbone, absent)
    report.notes += [NOTE_22K] if fitted.resized else []
    return report


def _is_head(name: str) -> bool:
    return name.split(".")[0] in HEAD_NAMES


def _fit_head(heads: Mapping[str, Tensor], net: HeadedNetwork, new_classes: bool) -> Fit:
    """Fit the tensors outside the backbone, in official names."""
    target = {name: tensor for name, tensor in net.state_dict().items() if _is_head(name)}
    fit = Fit()
    for name, tensor in heads.items():
        if name not in target:
            fit.dropped[name] = drop_rule(name, target) or "another head"
            continue
        if name.startswith("head.") and _is_22k(tensor, target[name]):
            fit.resized[name] = f"{tuple(tensor.shape)} -> {tuple(target[name].shape)}"
            tensor = tensor[:CLASSES_1K]
        problem = value_problem(name, tensor, target[name].dtype)
        if problem is not None:
            fit.problems.append(problem)
        elif tensor.shape == target[name].shape:
            fit.tensors[name] = tensor
        elif new_classes and name.startswith("head."):
            fit.dropped[name] = "another number of classes"
        else:
            fit.problems.append(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(target[name].shape)} in the "
                "model"
            )
    if not new_classes:
        fit.problems += [f"{name} is not in the file" for name in target if name not in heads]
    return fit


def _is_22k(tensor: Tensor, target: Tensor) -> bool:
    return tensor.ndim > 0 and (len(tensor), len(target)) == (CLASSES_22K, CLASSES_1K)
