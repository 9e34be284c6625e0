"""Identify a checkpoint from its names and shapes."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones.focalnet import FocalNet
from ..backbones.variants import FOCALNETS
from .architecture import infer_architecture
from .files import Checkpoint, read_checkpoint, unwrap
from .layouts import focal_transformer_names as focal_transformer
from .layouts.detectors import SET_LAYOUTS, public_layout
from .layouts.dino_names import inspect_dino
from .layouts.mask2former_names import inspect_mask2former
from .layouts.swin_resnet import find_peer_family, translate_peer
from .layouts.tables import LAYOUTS, OUTPUT_NORMS
from .layouts.translate import Translation, find, translate
from .tensor_shapes import match_variant, nearest_variants, visible_shapes
from .zoo import resolve_weights


@dataclass
class Inspection:
    """Description of a checkpoint.

    Attributes:
        origin: path of the file.
        layout: key of ``LAYOUTS``, or of ``SET_LAYOUTS`` for a whole model; None if it is neither
            that nor a FocalNet or Focal Transformer.
        architecture: for messages, such as "a Mask R-CNN (80 classes, FocalNet-T LRF)".
        family: "focalnet", "focal_transformer", "swin", "resnet" or "unknown".
        variant: name of the matching variant, None if there is none.
        overrides: fields that differ from the variant, such as larger windows.
        shapes: constructor arguments that shapes reveal.
        classes: number of classes, None without a classifier.
        output_norms: names of the output norms.
        feature_scales: number of feature maps that a DETR-like detector reads, None for others.
        queries: most boxes or masks of an image, of DINO and Mask2Former.
        conventions: key of ``CONVENTIONS`` in ``heads/dino``, of DINO.
        tasks: for which a Mask2Former of so many classes was published.
        method: key of ``METHODS`` in ``architecture.py`` for a whole model, otherwise None.
        parts: first part of the names outside the backbone -> number of tensors.
        parameters: number of elements in the backbone.
        precision: dtypes of the backbone's tensors.
        progress: training progress, such as {"epoch": 299}.
        ignored: classes and functions that the file names in addition to weights; not read.
        ambiguous_settings: settings that no shape reveals, with the assumed value and the reason.
        candidates: closest layouts or variants with their first difference, for unknown files.
    """

    origin: str
    layout: str | None = None
    architecture: str = ""
    family: str = "unknown"
    variant: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    output_norms: list[str] = field(default_factory=list)
    feature_scales: int | None = None
    queries: int | None = None
    conventions: str | None = None
    tasks: list[str] = field(default_factory=list)
    method: str | None = None
    parts: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    precision: list[str] = field(default_factory=list)
    progress: dict[str, int] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    ambiguous_settings: list[str] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)


def inspect_checkpoint(weights: str | Path | Mapping[str, Any]) -> Inspection:
    """Identify a checkpoint.

    Args:
        weights: path, URL, registered name or state dict.
    Raises: ValueError if it cannot be read.
    """
    if isinstance(weights, Mapping):
        checkpoint = unwrap(weights, "the given state dict")
    else:
        checkpoint = read_checkpoint(resolve_weights(weights))
    architecture = infer_architecture(checkpoint.tensors)
    result = Inspection(
        checkpoint.origin,
        architecture=str(architecture),
        family=find_peer_family(checkpoint.tensors) or "unknown",
        method=architecture.method if architecture.is_detector else None,
        classes=architecture.classes,
        progress=checkpoint.progress,
        ignored=list(checkpoint.ignored),
    )
    _describe_backbone(result, checkpoint)
    _describe_sets(result, checkpoint.tensors)
    return result


def _describe_backbone(result: Inspection, checkpoint: Checkpoint) -> None:
    peer = translate_peer(checkpoint.tensors)
    if peer is not None:
        _describe_tensors(result, peer)
        return
    translation = translate(checkpoint.tensors)
    try:
        result.shapes = visible_shapes(translation.backbone)
    except (ValueError, KeyError):
        result.candidates = nearest_layouts(checkpoint.tensors)
        return
    _describe(result, checkpoint, translation)


def _describe_sets(result: Inspection, tensors: Mapping[str, Tensor]) -> None:
    """Describe a whole DINO or Mask2Former."""
    layout = public_layout(tensors)
    if layout in SET_LAYOUTS:
        result.layout = layout
    if result.method == "mask2former" and layout in SET_LAYOUTS:
        mask2former = inspect_mask2former(tensors)
        result.queries, result.tasks = mask2former.queries, list(mask2former.tasks)
    dino = inspect_dino(tensors) if result.method == "dino" else None
    if dino is not None:
        result.layout = layout or "detectron2"
        result.queries, result.conventions = dino.queries, dino.conventions
        result.feature_scales = dino.sizes.levels


def _describe(result: Inspection, checkpoint: Checkpoint, translation: Translation) -> None:
    backbone = translation.backbone
    transformer = focal_transformer.is_focal_transformer(backbone)
    result.family = "focal_transformer" if transformer else "focalnet"
    result.layout = translation.layout
    match = match_variant(result.shapes)
    if match is None:
        result.candidates = nearest_variants(result.shapes)
    else:
        result.variant, result.overrides = match
    result.output_norms = [n for n in OUTPUT_NORMS if f"{n}.weight" in backbone]
    scales = next((n for n in checkpoint.tensors if n.endswith("transformer.level_embed")), None)
    if scales is not None:
        result.feature_scales = checkpoint.tensors[scales].shape[0]
    _describe_tensors(result, translation)
    result.ambiguous_settings = ambiguous_settings(backbone, None)
    result.candidates += [f"{name} is unknown in this layout" for name in translation.unknown[:3]]


def _describe_tensors(result: Inspection, translation: Translation) -> None:
    tensors = translation.backbone.values()
    result.parts = dict(Counter(name.split(".")[0] for name in translation.others))
    result.parameters = sum(tensor.numel() for tensor in tensors)
    result.precision = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def nearest_layouts(names: Collection[str]) -> list[str]:
    """Return the three layouts that match most names, each with the first name that differs."""
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


def ambiguous_settings(backbone: Mapping[str, Tensor], net: nn.Module | None) -> list[str]:
    """Describe the settings that no shape of a file reveals, with the assumed value and the reason.

    Args:
        backbone: tensors in official names.
        net: network that they are loaded into, None for the defaults of the file's variant.
    """
    try:
        shapes = visible_shapes(backbone)
    except (ValueError, KeyError):
        return []
    if "focal_levels" not in shapes:
        return []
    match = match_variant(shapes)
    spec = FOCALNETS[match[0]] if match else None
    notes = []
    if max(shapes["focal_levels"]) >= 4 and not shapes["post_norm_in_modulation"]:
        value = (
            normalizes_modulator(net)
            if net is not None
            else bool(spec and spec.normalize_modulator)
        )
        reason = f"as in {match[0]} ({spec.source})" if match and spec else "the default"
        reason = "as in the network" if net is not None else reason
        notes.append(
            f"normalize_modulator={value}, {reason}: no shape reveals it, and public copies "
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


def normalizes_modulator(net: nn.Module) -> bool:
    """Tell whether a network, or a part of it, normalizes its modulators."""
    return any(getattr(module, "normalize_modulator", False) for module in net.modules())


def describe_backbone(backbone: Mapping[str, Tensor], net: nn.Module) -> str:
    """Compare a file with a network in one sentence; return "" if the file has no known family."""
    try:
        shapes, target = visible_shapes(backbone), visible_shapes(net.state_dict())
    except (ValueError, KeyError):
        return ""
    match = match_variant(shapes)
    title = f"The file is {match[0]}" if match else "The file is not a published variant"
    if shapes.keys() != target.keys():
        return f"{title}, the network is of another family."
    differ = [name for name in shapes if shapes[name] != target[name]]
    if not differ:
        return ""
    parts = [f"{name} {shapes[name]} in the file, {target[name]} in the network" for name in differ]
    return f"{title}: {'; '.join(parts)}."
