"""What a checkpoint is, from its names and shapes alone."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones.focalnet import FocalNet
from ..backbones.variants import VARIANTS, FocalNetSpec
from .detectors import find_method, find_own_method
from .files import Checkpoint, read_checkpoint, unwrap
from .layouts import LAYOUTS, OUTPUT_NORMS
from .translate import Translation, find, translate
from .zoo import resolve_weights

BLOCK_START = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.modulation\.f\.weight$")
# Fields of a variant that shapes reveal. Windows come last: detectors enlarge them.
VISIBLE = (
    "embed_dim",
    "depths",
    "focal_levels",
    "conv_embed",
    "post_norm_in_modulation",
    "layer_scale",
    "patch_size",
    "mlp_ratio",
    "focal_windows",
)


@dataclass
class Inspection:
    """What a file holds.

    Attributes:
        origin: the file.
        layout: key of ``LAYOUTS``, None if it is no FocalNet.
        family: "focalnet", or "unknown".
        variant: name of the row it equals, None if there is none.
        overrides: fields in which it differs from that row, such as enlarged windows.
        shapes: constructor arguments that shapes reveal.
        classes: outputs of the classifier, None without one.
        output_norms: stages that have one.
        feature_scales: maps that a DETR-like detector reads, None if there is none.
        method: of a whole model with a table in ``detectors.py``, such as "mask_rcnn"; else None.
        parts: names outside the backbone, counted by their first word.
        parameters: numbers in the backbone.
        precision: dtypes of the backbone's tensors.
        progress: such as {"epoch": 299}.
        ignored: classes and functions that the file names beside its weights; they were left out.
        unknowns: what no shape reveals, with the default taken and why.
        candidates: nearest layouts or variants and the first difference, for unknown files.
    """

    origin: str
    layout: str | None = None
    family: str = "unknown"
    variant: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    output_norms: list[str] = field(default_factory=list)
    feature_scales: int | None = None
    method: str | None = None
    parts: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    precision: list[str] = field(default_factory=list)
    progress: dict[str, int] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknowns: list[str] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)


def inspect_checkpoint(weights: str | Path | Mapping[str, Any]) -> Inspection:
    """Says what a checkpoint is.

    Args:
        weights: path, registered name or state dict.
    Raises: ValueError if it cannot be read at all.
    """
    if isinstance(weights, Mapping):
        checkpoint = unwrap(weights, "the given state dict")
    else:
        checkpoint = read_checkpoint(resolve_weights(weights))
    translation = translate(checkpoint.tensors)
    result = Inspection(
        checkpoint.origin, progress=checkpoint.progress, ignored=list(checkpoint.ignored)
    )
    try:
        result.shapes = visible_shapes(translation.backbone)
    except (ValueError, KeyError):
        result.candidates = nearest_layouts(checkpoint.tensors)
        return result
    _describe(result, checkpoint, translation)
    return result


def _describe(result: Inspection, checkpoint: Checkpoint, translation: Translation) -> None:
    backbone = translation.backbone
    result.layout, result.family = translation.layout, "focalnet"
    match = match_variant(result.shapes)
    if match is None:
        result.candidates = nearest_variants(result.shapes)
    else:
        result.variant, result.overrides = match
    if "head.weight" in backbone:
        result.classes = backbone["head.weight"].shape[0]
    result.output_norms = [n for n in OUTPUT_NORMS if f"{n}.weight" in backbone]
    scales = next((n for n in checkpoint.tensors if n.endswith("transformer.level_embed")), None)
    if scales is not None:
        result.feature_scales = checkpoint.tensors[scales].shape[0]
    result.method = find_method(checkpoint.tensors) or find_own_method(checkpoint.tensors)
    result.parts = dict(Counter(name.split(".")[0] for name in translation.others))
    result.parameters = sum(tensor.numel() for tensor in backbone.values())
    result.precision = sorted({str(t.dtype).removeprefix("torch.") for t in backbone.values()})
    result.unknowns = unknowns(backbone, None)
    result.candidates += [f"{name} is in no row of this layout" for name in translation.unknown[:3]]


def visible_shapes(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of the network that official names and shapes belong to.

    Raises: ValueError or KeyError if they are those of no FocalNet.
    """
    stem = backbone["patch_embed.proj.weight"]
    matches = (BLOCK_START.match(name) for name in backbone)
    blocks = {(int(m[1]), int(m[2])) for m in matches if m}
    stages = 1 + max((i for i, _ in blocks), default=-1)
    depths = tuple(1 + max((j for i, j in blocks if i == s), default=-1) for s in range(stages))
    if stem.ndim != 4 or stages == 0 or 0 in depths:
        raise ValueError("no FocalNet: blocks are missing")
    levels, windows = [], []
    for stage in range(stages):
        module = f"layers.{stage}.blocks.0.modulation"
        rows, dim = backbone[f"{module}.f.weight"].shape
        levels.append(rows - 2 * dim - 1)
        windows.append(backbone[f"{module}.focal_layers.0.0.weight"].shape[-1])
    first = "layers.0.blocks.0"
    hidden, dim = backbone[f"{first}.mlp.fc1.weight"].shape
    # A stem of 4x4 or 16x16 does not overlap, one of 7x7 has stride 4.
    kernel = stem.shape[-1]
    return {
        "in_channels": stem.shape[1],
        "embed_dim": stem.shape[0],
        "depths": depths,
        "mlp_ratio": hidden / dim,
        "focal_levels": tuple(levels),
        "focal_windows": tuple(windows),
        "conv_embed": kernel == 7,
        "post_norm_in_modulation": f"{first}.modulation.ln.weight" in backbone,
        "layer_scale": f"{first}.gamma_1" in backbone,
        "patch_size": 4 if kernel == 7 else kernel,
    }


def _row(spec: FocalNetSpec) -> dict[str, Any]:
    row = {name: getattr(spec, name) for name in VISIBLE}
    return row | {"layer_scale": spec.layer_scale is not None}


def _difference(shapes: Mapping[str, Any], spec: FocalNetSpec) -> list[str]:
    row = _row(spec)
    return [name for name in VISIBLE if shapes[name] != row[name]]


def match_variant(shapes: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The variant that shapes belong to, and the windows or channels in which it differs."""
    channels = {} if shapes["in_channels"] == 3 else {"in_channels": shapes["in_channels"]}
    choices: tuple[list[str], ...] = ([], ["focal_windows"])
    for allowed in choices:
        for name, spec in VARIANTS.items():
            if _difference(shapes, spec) == allowed:
                return name, {field: shapes[field] for field in allowed} | channels
    return None


def nearest_variants(shapes: Mapping[str, Any]) -> list[str]:
    """The three most similar rows, each with its first difference."""
    ranked = sorted(VARIANTS, key=lambda name: len(_difference(shapes, VARIANTS[name])))
    texts = []
    for name in ranked[:3]:
        first = _difference(shapes, VARIANTS[name])[0]
        expected = _row(VARIANTS[name])[first]
        texts.append(f"{name}, but {first} is {shapes[first]} instead of {expected}")
    return texts


def nearest_layouts(names: Collection[str]) -> list[str]:
    """The three layouts that fit most names, each with the first name that does not fit."""
    scored = []
    for key, layout in LAYOUTS.items():
        for prefix in layout.prefixes:
            misfits = [name for name in names if find(key, prefix, name) is None]
            scored.append((len(misfits), layout.title, misfits[:1]))
    texts: dict[str, str] = {}
    for count, title, first in sorted(scored):
        where = f", first {first[0]}" if first else ""
        texts.setdefault(title, f"{title}: {count} of {len(names)} names differ{where}")
    return list(texts.values())[:3]


def unknowns(backbone: Mapping[str, Tensor], net: nn.Module | None) -> list[str]:
    """What no shape of a file reveals and matters for it, with the value taken and why.

    Args:
        backbone: tensors in official names.
        net: the network they are loaded into, None for the defaults of the file's variant.
    """
    try:
        shapes = visible_shapes(backbone)
    except (ValueError, KeyError):
        return []
    match = match_variant(shapes)
    spec = VARIANTS[match[0]] if match else None
    notes = []
    if max(shapes["focal_levels"]) >= 4 and not shapes["post_norm_in_modulation"]:
        taken = _normalises(net) if net is not None else bool(spec and spec.normalize_modulator)
        why = f"the row of {match[0]} ({spec.source})" if match and spec else "the default"
        why = "the network" if net is not None else why
        notes.append(
            f"normalize_modulator={taken}, by {why}: no shape reveals it, and public copies "
            "differ (large_fl4: True in the official code, False in timm; xlarge_fl4: False in "
            "the official code, True in FocalNet-DINO)."
        )
    if shapes["conv_embed"]:
        padding = net.patch_embed.proj.padding[0] if isinstance(net, FocalNet) else 2
        notes.append(
            f"stem_padding={padding}: no shape reveals it. Pretraining used 2; the official "
            "detection and segmentation files, focal_dw of X-Decoder and mmpretrain use 3."
        )
    return notes


def _normalises(net: nn.Module) -> bool:
    return any(getattr(module, "normalize_modulator", False) for module in net.modules())


def describe_backbone(backbone: Mapping[str, Tensor], net: nn.Module) -> str:
    """One sentence that sets a file against a network, "" if the file is no FocalNet."""
    try:
        shapes, own = visible_shapes(backbone), visible_shapes(net.state_dict())
    except (ValueError, KeyError):
        return ""
    differ = [n for n in ("in_channels", *VISIBLE) if shapes[n] != own[n]]
    if not differ:
        return ""
    match = match_variant(shapes)
    title = f"The file is {match[0]}" if match else "The file is no published variant"
    parts = [f"{name} {shapes[name]} in the file, {own[name]} in the network" for name in differ]
    return f"{title}: {'; '.join(parts)}."
