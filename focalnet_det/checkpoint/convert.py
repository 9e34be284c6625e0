"""Convert state dicts and files from one layout to another."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import write_text
from ..backbones.variants import FOCALNETS
from .architecture import infer_architecture
from .files import read_checkpoint, unwrap, write_state_dict
from .fit import value_problem
from .layouts.detectors import (
    METHODS,
    SET_LAYOUTS,
    find_detectron2_method,
    public_layout,
    set_to_public,
    to_detectron2,
    to_public,
)
from .layouts.focal_transformer_names import MODULES, is_focal_transformer
from .layouts.swin_resnet import find_peer_family
from .layouts.tables import LAYOUTS
from .layouts.translate import Translation, is_post_norm, translate, write
from .tensor_shapes import match_variant, visible_shapes
from .zoo import resolve_weights

# Layouts that whole detectors can be written in, in addition to the backbone layouts in LAYOUTS.
DETECTOR_LAYOUTS = (*dict.fromkeys(rules.layout for rules in METHODS.values()), *SET_LAYOUTS)


@dataclass
class Conversion:
    """Result of a conversion, with every tensor of the source accounted for.

    Attributes:
        layout: layout of the source.
        tensors: tensors in the requested layout.
        dropped: name in the source -> rule by which it was dropped.
    """

    layout: str
    tensors: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"Converted {len(self.tensors)} tensors from {layout_title(self.layout)} names."
        for rule in dict.fromkeys(self.dropped.values()):
            names = [name for name, r in self.dropped.items() if r == rule]
            more = ", ..." if len(names) > 8 else ""
            text += f"\n  Dropped, {rule}: {', '.join(names[:8])}{more}"
        return text


def layout_title(key: str) -> str:
    """Return the title of a layout of backbones or whole models."""
    return LAYOUTS[key].title if key in LAYOUTS else SET_LAYOUTS[key]


def convert_state_dict(tensors: Mapping[str, Tensor], to: str) -> Conversion:
    """Translate the names of a state dict to another layout; values do not change.

    Methods with a table in ``detectors.py`` are converted to Detectron2 and back as whole models.
    In all other cases only the backbone is converted.

    Args:
        tensors: state dict in any layout of ``LAYOUTS``.
        to: "official", "timm", "huggingface", "detectron2"; for whole models "mmdet", "mmseg" or a
            key of ``SET_LAYOUTS``.
    Raises: ValueError if a name is unknown, the layout cannot be written, or a weight is not a
        finite floating-point tensor.
    """
    public = to == "detectron2" and public_layout(tensors) is not None
    if find_peer_family(tensors) is not None and not public:
        raise ValueError(
            f"This is {infer_architecture(tensors)}, which need not be converted: its file can be "
            "loaded directly. Only FocalNets, Focal Transformers and whole mmdet models (to "
            "detectron2) are converted."
        )
    if to in DETECTOR_LAYOUTS:
        _check_values(tensors.items())
        write_names = set_to_public if to in SET_LAYOUTS else _to_public
        return Conversion("detectron2", write_names(tensors, to))
    if public:
        _check_values(tensors.items())
        converted, layout = to_detectron2(tensors)
        return Conversion(layout, converted)
    return _convert_backbone(translate(tensors), to)


def _convert_backbone(translation: Translation, to: str) -> Conversion:
    if translation.unknown:
        more = len(translation.unknown) - 1
        raise ValueError(
            f"{translation.unknown[0]} is not a {LAYOUTS[translation.layout].title} name"
            + (f" (and {more} more)." if more else ".")
        )
    renamed, backbone = translation.renamed, translation.backbone
    known = LAYOUTS[to].modules if to in LAYOUTS else ()
    if is_focal_transformer(backbone) and not set(MODULES) <= set(known):
        raise ValueError(f"The layout {to!r} has no Focal Transformers.")
    _check_values((renamed.get(name, name), tensor) for name, tensor in backbone.items())
    written, unsupported = write(backbone, to)
    dropped = {renamed.get(name, name): rule for name, rule in unsupported.items()}
    outside = dict.fromkeys(translation.others, "outside the backbone")
    return Conversion(translation.layout, written, translation.dropped | dropped | outside)


def _check_values(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that tensors can be weights.

    Raises: ValueError that names the first invalid tensor and counts the others.
    """
    problems = [p for p in (value_problem(name, tensor) for name, tensor in tensors) if p]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"Nothing was converted: {problems[0]}{more}.")


def _to_public(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    method = find_detectron2_method(tensors)
    if method is None or METHODS[method].layout != layout:
        known = ", ".join(name for name, rules in METHODS.items() if rules.layout == layout)
        actual = "not such a model" if method is None else method
        raise ValueError(
            f"Only whole models of {known}, saved by this package in Detectron2's names, can be "
            f"written as {layout}; this file is {actual}."
        )
    return to_public(tensors, method)


def convert_checkpoint(
    source: str | Path | Mapping[str, Any], output: str | Path, to: str
) -> Conversion:
    """Convert a file; see :func:`convert_state_dict`.

    Args:
        source: path, URL, registered name or state dict.
        output: file to write, ``.safetensors`` or any other suffix for torch.save; in a folder,
            ``model.safetensors`` is written. For "huggingface" a ``config.json`` is written too.
        to: layout of the output.
    Raises: ValueError as :func:`convert_state_dict`, OSError if the output cannot be written.
    """
    if isinstance(source, Mapping):
        checkpoint = unwrap(source, "the given state dict")
    else:
        checkpoint = read_checkpoint(resolve_weights(source))
    conversion = convert_state_dict(checkpoint.tensors, to)
    output = Path(output)
    if output.is_dir() or not output.suffix:
        output = output / "model.safetensors"
    container = LAYOUTS[to].container if to in LAYOUTS else "model"
    config = None
    if to == "huggingface":
        config = huggingface_config(translate(conversion.tensors).backbone)
    write_state_dict(output, conversion.tensors, container)
    if config is not None:
        write_text(output.with_name("config.json"), json.dumps(config, indent=2) + "\n")
    return conversion


def huggingface_config(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of transformers' ``FocalNetConfig`` for official names and shapes.

    Raises: ValueError or KeyError if the tensors are not those of a FocalNet.
    """
    shapes = visible_shapes(backbone)
    match = match_variant(shapes)
    row = FOCALNETS[match[0]] if match else None
    stages = len(shapes["depths"])
    # Stages of transformers include the downsampling at their end, so they have the next channels.
    widths = [shapes["embed_dim"] * 2 ** min(i + 1, stages - 1) for i in range(stages)]
    config = {
        "architectures": [
            "FocalNetForMaskedImageModeling"
            if "mask_token" in backbone
            else "FocalNetForImageClassification"
        ],
        "model_type": "focalnet",
        "num_channels": shapes["in_channels"],
        "patch_size": shapes["patch_size"],
        "embed_dim": shapes["embed_dim"],
        "hidden_sizes": widths,
        "depths": list(shapes["depths"]),
        "focal_levels": list(shapes["focal_levels"]),
        "focal_windows": list(shapes["focal_windows"]),
        "mlp_ratio": shapes["mlp_ratio"],
        "use_conv_embed": shapes["conv_embed"],
        "use_layerscale": shapes["layer_scale"],
        "use_post_layernorm": is_post_norm(backbone),
        "use_post_layernorm_in_modulation": shapes["post_norm_in_modulation"],
        "normalize_modulator": bool(row and row.normalize_modulator),
    }
    if "head.weight" in backbone:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(backbone["head.weight"].shape[0])}
    return config
