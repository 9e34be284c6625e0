"""Load strictly: every key of a file is used, resized, dropped by name, or an error."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones.focalnet import FocalModulation, FocalNet
from .architecture import infer_architecture, name_mismatch
from .files import Checkpoint, read_checkpoint, unwrap
from .fit import OUTPUT_NORM, Fit, fit_backbone, value_problem
from .global_level import set_global_level
from .inspect import ambiguous_settings, describe_backbone, nearest_layouts, normalizes_modulators
from .layouts.detectors import BACKBONE, to_detectron2
from .layouts.focal_transformer_names import SET, UNUSED_SET, absent_neighbors, notes, unused_sets
from .layouts.swin_resnet import CONSTANT, find_family, other_constants, peer_notes, translate_peer
from .layouts.translate import Translation, translate
from .measure import shrinking_error
from .zoo import resolve_weights

# Layers of Detectron2's heads whose size is a number of classes.
CLASS_LAYERS = re.compile(r"\.(cls_score|bbox_pred|predictor|conv_seg)\.")
logger = logging.getLogger("focalnet_det")

OUTSIDE = "outside the backbone"


@dataclass
class LoadReport:
    """What became of every tensor of a file and of the model.

    Attributes:
        loaded: names that were taken as they are.
        resized: names that were padded, cropped or regrouped to another shape.
        dropped: names in the file that the model does not need.
        missing: names in the model that the file does not have: they keep their initial values.
        renamed: name in the model -> name in the file, where they differ.
        rules: name of a dropped tensor -> the rule by which it was dropped.
        layout: key of the file's layout in ``focalnet_det.checkpoint.layouts.tables.LAYOUTS``.
        share: of the backbone's numbers that came from the file, 0..1, output norms apart.
        notes: defaults that were taken, and what a resizing changes.
        warnings: what was lost; logged as well.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    layout: str = "official"
    share: float = 0.0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"Loaded {len(self.loaded)} tensors, resized {len(self.resized)}, "
            f"dropped {len(self.dropped)}; {len(self.missing)} are new."
        )
        text += f" Layout: {self.layout}. {100 * self.share:.1f} % of the backbone."
        for rule in dict.fromkeys(self.rules.values()):
            text += _listed(f"Dropped, {rule}", [n for n, r in self.rules.items() if r == rule])
        text += _listed("Resized", self.resized) + _listed("New", self.missing)
        text += "".join(f"\n  Note: {note}" for note in self.notes)
        return text + "".join(f"\n  Warning: {warning}" for warning in self.warnings)


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"\n  {title}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def load_pretrained(
    net: nn.Module,
    weights: str | Path | Mapping[str, Any],
    *,
    allow_inflation: bool = True,
    levels: str | None = None,
    allow_missing: bool = False,
    min_loaded: float = 0.95,
) -> LoadReport:
    """Load a backbone from a file of any public layout: a classifier's, or a detector's.

    Nothing is loaded unless everything fits.

    Args:
        net: a backbone.
        weights: path, URL, registered name such as "focalnet_tiny_lrf.in1k", or state dict.
        allow_inflation: pad or crop depthwise kernels of another size, and adapt the stem to
            another number of image channels.
        levels: what to do if the numbers of focal levels differ. None refuses; "official" grows as
            the official code does, which changes the outputs, "by_kernel" the same with levels
            matched by kernel size; "preserving" grows without changing the outputs, see
            :func:`focalnet_det.checkpoint.advance_global_level`; "shrink" drops the last levels and
            notes how much that changes the features.
        allow_missing: let parameters of the network that the file lacks keep their values.
        min_loaded: share of the backbone's numbers that the file must give all the same.
    Returns: what happened to every tensor.
    Raises: ValueError if the file cannot be read, belongs to another network, or holds names,
        shapes or values that the network cannot take.
    """
    checkpoint = open_checkpoint(weights)
    target = net.state_dict()
    peer = translate_peer(checkpoint.tensors) if find_family(target) else None
    translation = peer or translate(checkpoint.tensors)
    fit = fit_backbone(
        translation.backbone,
        target,
        resize=allow_inflation,
        levels=levels,
        normalized=normalizes_modulators(net),
    )
    fit.problems += [f"{name} is not in the network" for name in translation.unknown]
    fit.problems += other_constants(translation.backbone, target)
    absent = absent_neighbors(translation.backbone, target)
    initial = [*_initial_kernels(target, fit, levels), *absent, *filter(SET.match, target)]
    new, share = _compare(fit, target, initial, allow_missing, min_loaded)
    if fit.problems:
        explanation = explain_misfit(checkpoint.tensors, translation, net)
        raise_problems(fit.problems, checkpoint.origin, explanation)
    report = _report(translation, fit)
    report.missing, report.share = new, share
    if levels == "shrink" and isinstance(net, FocalNet):
        report.notes.append(shrinking_error(net, translation.backbone, fit.tensors))
    _apply(net, fit)
    _report_unused_sets(net, fit, report)
    _warn_of_cropping(fit, report)
    report.notes += ambiguous_settings(translation.backbone, net) + notes(net, absent)
    report.notes += peer_notes(translation.layout, net)
    return report


def _report_unused_sets(net: nn.Module, fit: Fit, report: LoadReport) -> None:
    unused = unused_sets(net, fit.tensors)
    report.loaded = [name for name in report.loaded if name not in unused]
    report.dropped += unused
    report.rules |= dict.fromkeys(unused, UNUSED_SET)


def _compare(
    fit: Fit, target: Mapping[str, Tensor], initial: list[str], allow_missing: bool, enough: float
) -> tuple[list[str], float]:
    """Note what a backbone's file lacks; return the names that are new, and the share loaded.

    Args:
        initial: names that files may lack, whose tensors keep their initial values.
    """
    new = [name for name in target if name not in fit.tensors and not _grows(name, fit)]
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
    """Return the tensors of a file, URL, registered name or state dict.

    Raises: ValueError as :func:`load_pretrained`.
    """
    if not isinstance(weights, Mapping):
        return read_checkpoint(resolve_weights(weights))
    checkpoint = unwrap(weights, "The given dict")
    checkpoint.origin = "the given state dict"
    return checkpoint


def _initial_kernels(target: Mapping[str, Tensor], fit: Fit, levels: str | None) -> list[str]:
    """Return grown levels that keep their initial kernels, as in the official code."""
    if levels not in ("official", "by_kernel"):
        return []
    grown = {name.rpartition("f.")[0] for name in fit.resized if name.endswith("modulation.f.bias")}
    kernels = [name for name in target if ".focal_layers." in name and name not in fit.tensors]
    return [name for name in kernels if name.partition("focal_layers.")[0] in grown]


def _grows(name: str, fit: Fit) -> bool:
    """Tell whether a name is the state of a growth that the file sets."""
    return name.endswith(".global_level") and name.removesuffix(".global_level") in (
        fit.global_levels
    )


def loaded_share(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
    """Return the share of a backbone's numbers that are among the tensors, output norms apart."""
    counts = {n: t.numel() for n, t in target.items() if not OUTPUT_NORM.match(n)}
    return sum(c for n, c in counts.items() if n in tensors) / max(sum(counts.values()), 1)


def _report(translation: Translation, fit: Fit) -> LoadReport:
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


def _apply(net: nn.Module, fit: Fit) -> None:
    for module, level in fit.global_levels.items():
        if isinstance(net.get_submodule(module), FocalModulation):
            set_global_level(net, module, level)
    net.load_state_dict(fit.tensors, strict=False)


def _warn_of_cropping(fit: Fit, report: LoadReport) -> None:
    if fit.cropped:
        first = fit.cropped[0]
        report.warnings.append(
            f"{len(fit.cropped)} kernels are larger in the file and lost their borders, which "
            f"changes the features: first {first}, {fit.resized[first]}. Set focal_windows to the "
            "file's, which tools/inspect_checkpoint.py shows, to keep them."
        )
        logger.warning("%s", report.warnings[-1])


def load_initial_weights(
    model: nn.Module, path: str | Path, *, new_classes: bool = True, levels: str | None = None
) -> LoadReport:
    """Start a detector from a file: a whole detector, or a backbone alone.

    Args:
        model: a Detectron2 model with a ``backbone``, which may be an FPN over ``bottom_up``.
        path: a file, URL or registered name. A whole model may be one saved here, or one of mmdet's
            or mmseg's whose method ``focalnet_det.checkpoint.layouts.detectors`` has a table for.
        new_classes: let the last layers of the heads start anew where their class count differs;
            False, for evaluation, demands every tensor as it is.
        levels: for other numbers of focal levels, as in :func:`load_pretrained`.
    Returns: what happened to every tensor.
    Raises: ValueError as :func:`load_pretrained`; nothing is loaded then.
    """
    checkpoint = open_checkpoint(path)
    target = model.state_dict()
    mismatch = name_mismatch(checkpoint.tensors, target)
    if mismatch is not None:
        raise ValueError(
            f"{checkpoint.origin} does not fit, nothing was loaded: {mismatch}. (A FocalNet's "
            "backbone alone is written by tools/convert_checkpoint.py --to official.)"
        )
    tensors, layout = to_detectron2(checkpoint.tensors)
    prefix = backbone_prefix(target)
    if not any(name in target for name in tensors if not name.startswith(prefix)):
        if not new_classes:
            raise ValueError(
                f"{checkpoint.origin} holds no weights of this detector: it is "
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
    """Return the prefix of a Detectron2 model's backbone, which may be ``bottom_up`` of an FPN."""
    return BACKBONE if any(name.startswith(BACKBONE) for name in names) else "backbone."


def _load_detector(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    origin: str,
    new_classes: bool,
    prefix: str,
    levels: str | None,
) -> LoadReport:
    """Load a whole detector in our own names."""
    target = model.state_dict()
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    own = {n.removeprefix(prefix): t for n, t in target.items() if n.startswith(prefix)}
    fit = fit_backbone(
        inside, own, resize=new_classes, levels=levels, normalized=normalizes_modulators(model)
    )
    initial = {prefix + n for n in (*_initial_kernels(own, fit, levels), *filter(SET.match, own))}
    fit = fit.prefixed(prefix)
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    rules = fit.dropped | _fit_head(outside, target, new_classes, fit)
    report = LoadReport(layout="detectron2", rules=rules)
    new = [name for name in target if name not in fit.tensors and not _grows(name, fit)]
    report.missing = [name for name in new if not CONSTANT.search(name)]
    accepted = initial | set(rules)
    fit.problems += [f"{n} is not in the file" for n in report.missing if n not in accepted]
    if fit.problems:
        file, here = infer_architecture(tensors), infer_architecture(target)
        differ = file != here and file.is_detector
        explanation = f"The file is {file}; the config builds {here}." if differ else ""
        raise_problems(fit.problems, origin, explanation)
    report.loaded = [name for name in fit.tensors if name not in fit.resized]
    report.resized = [name for name in fit.tensors if name in fit.resized]
    report.dropped = list(report.rules)
    report.share = loaded_share(own, inside)
    _apply(model, fit)
    _report_unused_sets(model, fit, report)
    _warn_of_cropping(fit, report)
    return report


def _fit_head(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], new_classes: bool, fit: Fit
) -> dict[str, str]:
    """Fit what stands outside the backbone; return the rules by which tensors are dropped."""
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
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(target[name].shape)} here"
            )
    return rules


def raise_problems(problems: Iterable[str], origin: str, explanation: str = "") -> None:
    """Name the first problem and count the others.

    Args:
        explanation: a sentence for several problems, "" for none.
    Raises: ValueError if there are any.
    """
    problems = list(problems)
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = f"{origin} does not fit this network, nothing was loaded: {problems[0]}{more}."
    raise ValueError(f"{text} {explanation if more else ''}".rstrip())


def explain_misfit(tensors: Mapping[str, Tensor], translation: Translation, net: nn.Module) -> str:
    """Return a sentence that sets a file against a network, "" if nothing is known of it."""
    file, own = infer_architecture(tensors), infer_architecture(net.state_dict())
    if file.backbone and own.backbone and file.backbone != own.backbone:
        title = f"The file is {file}, the network {own.backbone}."
        return f"{title} {describe_backbone(translation.backbone, net)}".rstrip()
    if len(translation.unknown) > len(translation.backbone):
        nearest = nearest_layouts([*translation.backbone, *translation.unknown])
        return f"It is in no known layout; nearest: {'; '.join(nearest)}."
    return describe_backbone(translation.backbone, net)
