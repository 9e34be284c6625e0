"""Load weights strictly: every key of a file is used, resized, dropped by a rule, or an error."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones.focalnet import FocalModulation, FocalNet
from .architecture import infer_architecture, name_mismatch
from .dino_fit import settle_dino
from .files import Checkpoint, read_checkpoint, unwrap
from .fit import OUTPUT_NORM, Fit, fit_backbone, value_problem
from .global_level import set_global_level
from .inspect import ambiguous_settings, describe_backbone, nearest_layouts, normalizes_modulator
from .layouts.detectors import BACKBONE, to_detectron2
from .layouts.focal_transformer_names import (
    SET_NAME,
    UNUSED_SET,
    absent_neighbors,
    notes,
    unused_sets,
)
from .layouts.swin_resnet import (
    CONSTANT,
    constant_problems,
    find_peer_family,
    peer_notes,
    translate_peer,
)
from .layouts.translate import Translation, translate
from .load_report import LoadReport
from .measure import shrinking_error
from .zoo import resolve_weights

# Layers of heads whose size depends on the number of classes.
CLASS_LAYERS = re.compile(
    r"\.(cls_score|bbox_pred|conv_seg)\.|\.predictor\.(weight|bias)$|"
    r"(^|\.)((enc_out_)?class_embed|label_enc)\.|^criterion\.empty_weight$"
)
logger = logging.getLogger("focalnet_det")

OUTSIDE = "outside the backbone"


def load_pretrained(
    net: nn.Module,
    weights: str | Path | Mapping[str, Any],
    *,
    allow_inflation: bool = True,
    levels: str | None = None,
    allow_missing: bool = False,
    min_loaded: float = 0.95,
) -> LoadReport:
    """Load a backbone from a file in any public layout, of a classifier or a detector.

    Nothing is loaded unless everything fits.

    Args:
        net: backbone.
        weights: path, URL, registered name such as "focalnet_tiny_lrf.in1k", or state dict.
        allow_inflation: pad or crop depthwise kernels of another size, and adapt the stem to
            another number of image channels.
        levels: what to do if the numbers of focal levels differ. None refuses. "official" adds
            levels as the official code does, which changes the outputs; "by_kernel" does so with
            levels matched by kernel size. "preserving" adds levels without changing the outputs,
            see :func:`focalnet_det.checkpoint.advance_global_level`. "shrink" drops the last levels
            and notes how much that changes the features.
        allow_missing: let parameters that the file does not have keep their values.
        min_loaded: fraction of the backbone's elements that the file must have in any case, 0..1.
    Returns: a report on every tensor.
    Raises: ValueError if the file cannot be read, belongs to another network, or has names, shapes
        or values that do not fit the network.
    """
    checkpoint = open_checkpoint(weights)
    target = net.state_dict()
    peer = translate_peer(checkpoint.tensors) if find_peer_family(target) else None
    translation = peer or translate(checkpoint.tensors)
    fit = _fit_translation(translation, net, target, resize=allow_inflation, levels=levels)
    absent = absent_neighbors(translation.backbone, target)
    initial = [*new_level_kernels(target, fit, levels), *absent, *filter(SET_NAME.match, target)]
    new, share = check_missing(fit, target, initial, allow_missing, min_loaded)
    if fit.problems:
        explanation = explain_misfit(checkpoint.tensors, translation, net)
        raise_misfit(fit.problems, checkpoint.origin, explanation)
    report = build_report(translation, fit)
    report.missing, report.share = new, share
    if levels == "shrink" and isinstance(net, FocalNet):
        report.notes.append(shrinking_error(net, translation.backbone, fit.tensors))
    apply_fit(net, fit, report)
    report.notes += ambiguous_settings(translation.backbone, net) + notes(net, absent)
    report.notes += peer_notes(translation.layout, net)
    return report


def _fit_translation(
    translation: Translation,
    net: nn.Module,
    target: Mapping[str, Tensor],
    *,
    resize: bool,
    levels: str | None,
) -> Fit:
    """Fit a translated file to the state dict of a network, with all problems of the names."""
    fit = fit_backbone(
        translation.backbone,
        target,
        resize=resize,
        levels=levels,
        normalized=normalizes_modulator(net),
    )
    fit.problems += [f"{name} is not in the network" for name in translation.unknown]
    fit.problems += constant_problems(translation.backbone, target)
    return fit


def apply_fit(net: nn.Module, fit: Fit, report: LoadReport) -> None:
    """Load fitted tensors, and report sets that the network does not use and cropped kernels."""
    for module, level in fit.global_levels.items():
        if isinstance(net.get_submodule(module), FocalModulation):
            set_global_level(net, module, level)
    net.load_state_dict(fit.tensors, strict=False)
    _report_unused_sets(net, fit, report)
    _warn_about_cropping(fit, report)


def _report_unused_sets(net: nn.Module, fit: Fit, report: LoadReport) -> None:
    unused = unused_sets(net, fit.tensors)
    report.loaded = [name for name in report.loaded if name not in unused]
    report.dropped += unused
    report.rules |= dict.fromkeys(unused, UNUSED_SET)


def check_missing(
    fit: Fit, target: Mapping[str, Tensor], initial: list[str], allow_missing: bool, enough: float
) -> tuple[list[str], float]:
    """Add problems for missing tensors to a fit.

    Args:
        fit: fit of the file, updated in place.
        target: state dict of the network.
        initial: names that a file need not have, whose tensors keep their initial values.
        allow_missing: accept other missing names too.
        enough: fraction of the elements that the file must have.
    Returns: names that keep their initial values, and the fraction of elements loaded.
    """
    new = [name for name in target if name not in fit.tensors and not _is_global_level(name, fit)]
    new = [name for name in new if not CONSTANT.search(name)]
    missing = [name for name in new if not OUTPUT_NORM.match(name) and name not in initial]
    if not allow_missing:
        fit.problems += [f"{name} is not in the file" for name in missing]
    share = loaded_share({n: t for n, t in target.items() if n not in initial}, fit.tensors)
    if not fit.problems and share < enough:
        fit.problems.append(
            f"only {100 * share:.1f} % of the backbone is in the file, less than {100 * enough:g} %"
        )
    return new, share


def open_checkpoint(weights: str | Path | Mapping[str, Any]) -> Checkpoint:
    """Read the checkpoint that a path, URL, registered name or state dict stands for.

    Raises: ValueError if it cannot be read.
    """
    if not isinstance(weights, Mapping):
        return read_checkpoint(resolve_weights(weights))
    checkpoint = unwrap(weights, "The given dict")
    checkpoint.origin = "the given state dict"
    return checkpoint


def new_level_kernels(target: Mapping[str, Tensor], fit: Fit, levels: str | None) -> list[str]:
    """Return the kernels of added levels that keep their initial values, as officially."""
    if levels not in ("official", "by_kernel"):
        return []
    bias = "modulation.f.bias"
    resized = {name.rpartition("f.")[0] for name in fit.resized if name.endswith(bias)}
    kernels = [name for name in target if ".focal_layers." in name and name not in fit.tensors]
    return [name for name in kernels if name.partition("focal_layers.")[0] in resized]


def _is_global_level(name: str, fit: Fit) -> bool:
    """Tell whether a name is a global level that the file sets."""
    return name.endswith(".global_level") and name.removesuffix(".global_level") in (
        fit.global_levels
    )


def loaded_share(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
    """Return the fraction of a backbone's elements that tensors contain, without output norms."""
    counts = {n: t.numel() for n, t in target.items() if not OUTPUT_NORM.match(n)}
    return sum(c for n, c in counts.items() if n in tensors) / max(sum(counts.values()), 1)


def build_report(translation: Translation, fit: Fit) -> LoadReport:
    """Report what a fit loads, resizes and drops, by the names of the file."""
    rules = {translation.renamed.get(name, name): rule for name, rule in fit.dropped.items()}
    rules |= translation.dropped | dict.fromkeys(translation.others, OUTSIDE)
    return LoadReport(
        loaded=[name for name in fit.tensors if name not in fit.resized],
        resized=[name for name in fit.tensors if name in fit.resized],
        dropped=list(rules),
        renamed={n: o for n, o in translation.renamed.items() if n in fit.tensors},
        rules=rules,
        layout=translation.layout,
    )


def _warn_about_cropping(fit: Fit, report: LoadReport) -> None:
    if fit.cropped:
        first = fit.cropped[0]
        report.warnings.append(
            f"{len(fit.cropped)} kernels are larger in the file and were cropped, which changes "
            f"the features: first {first}, {fit.resized[first]}. To keep them, set focal_windows "
            "to the values that tools/inspect_checkpoint.py prints for the file."
        )
        logger.warning("%s", report.warnings[-1])


def load_detector(
    model: nn.Module,
    path: str | Path | Mapping[str, Any],
    *,
    new_classes: bool = True,
    levels: str | None = None,
) -> LoadReport:
    """Initialize a detector from a file of a whole detector or of a backbone.

    Args:
        model: Detectron2 model with a ``backbone``, which may be an FPN over ``bottom_up``.
        path: file, URL or registered name. A whole model may be one saved by this package, or one
            of a public layout with a table in ``focalnet_det.checkpoint.layouts.detectors``. A DINO
            takes over the conventions of its file, unless its config fixes others.
        new_classes: keep the initial values of the heads' last layers if the number of classes
            differs; False, for evaluation, requires every tensor to fit.
        levels: what to do if the numbers of focal levels differ, as in :func:`load_pretrained`.
    Returns: a report on every tensor.
    Raises: ValueError as :func:`load_pretrained` and :func:`settle_dino`; nothing is loaded then.
    """
    checkpoint = open_checkpoint(path)
    mismatch = name_mismatch(checkpoint.tensors, model.state_dict())
    if mismatch is not None:
        raise ValueError(
            f"{checkpoint.origin} does not fit, nothing was loaded: {mismatch}. (To extract the "
            "backbone of a FocalNet, use tools/convert_checkpoint.py --to official.)"
        )
    tensors, layout = to_detectron2(checkpoint.tensors)
    settle_dino(model, tensors, checkpoint.origin)
    target = model.state_dict()
    prefix = backbone_prefix(target)
    if not any(name in target for name in tensors if not name.startswith(prefix)):
        if not new_classes:
            raise ValueError(
                f"{checkpoint.origin} contains no weights of this detector: it is "
                f"{infer_architecture(checkpoint.tensors)}."
            )
        backbone = model.get_submodule("backbone")
        return load_pretrained(
            getattr(backbone, "bottom_up", backbone), checkpoint.tensors, levels=levels
        )
    report = _load_detector(model, tensors, checkpoint.origin, new_classes, prefix, levels)
    report.layout = layout
    return report


def backbone_prefix(names: Iterable[str]) -> str:
    """Return the prefix of the backbone in a Detectron2 model, with or without an FPN."""
    return BACKBONE if any(name.startswith(BACKBONE) for name in names) else "backbone."


def _load_detector(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    origin: str,
    new_classes: bool,
    prefix: str,
    levels: str | None,
) -> LoadReport:
    """Load a whole detector in Detectron2's names."""
    target = model.state_dict()
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    backbone = {n.removeprefix(prefix): t for n, t in target.items() if n.startswith(prefix)}
    fit = fit_backbone(
        inside, backbone, resize=new_classes, levels=levels, normalized=normalizes_modulator(model)
    )
    kernels = new_level_kernels(backbone, fit, levels)
    initial = {prefix + n for n in (*kernels, *filter(SET_NAME.match, backbone))}
    fit = fit.prefixed(prefix)
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    rules = fit.dropped | _fit_head(outside, target, new_classes, fit)
    report = LoadReport(layout="detectron2", rules=rules)
    new = [name for name in target if name not in fit.tensors and not _is_global_level(name, fit)]
    report.missing = [name for name in new if not CONSTANT.search(name)]
    accepted = initial | set(rules)
    fit.problems += [f"{n} is not in the file" for n in report.missing if n not in accepted]
    if fit.problems:
        file, built = infer_architecture(tensors), infer_architecture(target)
        differ = file != built and file.is_detector
        explanation = f"The file is {file}; the config builds {built}." if differ else ""
        raise_misfit(fit.problems, origin, explanation)
    report.loaded = [name for name in fit.tensors if name not in fit.resized]
    report.resized = [name for name in fit.tensors if name in fit.resized]
    report.dropped = list(report.rules)
    report.share = loaded_share(backbone, inside)
    apply_fit(model, fit, report)
    return report


def _fit_head(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], new_classes: bool, fit: Fit
) -> dict[str, str]:
    """Fit the tensors outside the backbone; return the rules by which tensors are dropped."""
    rules = {}
    for name, tensor in tensors.items():
        if name not in target:
            fit.problems.append(f"{name} is not in the model")
        elif target[name].shape == tensor.shape:
            problem = value_problem(name, tensor, target[name].dtype)
            fit.problems += [] if problem is None else [problem]
            fit.tensors[name] = tensor
        elif new_classes and CLASS_LAYERS.search(name):
            rules[name] = "another number of classes"
        else:
            fit.problems.append(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(target[name].shape)} in the "
                "model"
            )
    return rules


def raise_misfit(problems: Iterable[str], origin: str, explanation: str = "") -> None:
    """Raise an error that names the first problem and counts the others.

    Args:
        problems: reasons why the file does not fit.
        origin: path of the file.
        explanation: a sentence to add if there are several problems, "" for none.
    Raises: ValueError if there are any problems.
    """
    problems = list(problems)
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = f"{origin} does not fit this network, nothing was loaded: {problems[0]}{more}."
    raise ValueError(f"{text} {explanation if more else ''}".rstrip())


def explain_misfit(tensors: Mapping[str, Tensor], translation: Translation, net: nn.Module) -> str:
    """Explain in one sentence why a file does not fit a network; return "" if that is unknown."""
    file, built = infer_architecture(tensors), infer_architecture(net.state_dict())
    if file.backbone and built.backbone and file.backbone != built.backbone:
        title = f"The file is {file}, the network {built.backbone}."
        return f"{title} {describe_backbone(translation.backbone, net)}".rstrip()
    if len(translation.unknown) > len(translation.backbone):
        nearest = nearest_layouts([*translation.backbone, *translation.unknown])
        return f"Its layout is unknown; closest: {'; '.join(nearest)}."
    return describe_backbone(translation.backbone, net)
