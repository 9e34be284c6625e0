"""Infer the constructor arguments and the variant of a backbone from its tensor shapes."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..backbones.variants import FOCALNETS, BackboneSpec
from .layouts import focal_transformer_names as focal_transformer

BLOCK_START = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.modulation\.f\.weight$")
# Fields of a FocalNet variant that shapes reveal. Windows come last, as detectors enlarge them.
VISIBLE_FIELDS = (
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


def visible_shapes(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the constructor arguments of the network that official names and shapes belong to.

    Raises: ValueError or KeyError if they do not belong to a network of this package.
    """
    if focal_transformer.is_focal_transformer(backbone):
        return focal_transformer.visible_shapes(backbone)
    stem = backbone["patch_embed.proj.weight"]
    matches = (BLOCK_START.match(name) for name in backbone)
    blocks = {(int(m[1]), int(m[2])) for m in matches if m}
    stages = 1 + max((i for i, _ in blocks), default=-1)
    depths = tuple(1 + max((j for i, j in blocks if i == s), default=-1) for s in range(stages))
    if stem.ndim != 4 or stages == 0 or 0 in depths:
        raise ValueError("not a FocalNet: blocks are missing")
    levels, windows = [], []
    for stage in range(stages):
        module = f"layers.{stage}.blocks.0.modulation"
        rows, dim = backbone[f"{module}.f.weight"].shape
        levels.append(rows - 2 * dim - 1)
        windows.append(backbone[f"{module}.focal_layers.0.0.weight"].shape[-1])
    first = "layers.0.blocks.0"
    hidden, dim = backbone[f"{first}.mlp.fc1.weight"].shape
    # A kernel of 4x4 or 16x16 does not overlap; one of 7x7 has stride 4.
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


def _rows(shapes: Mapping[str, Any]) -> tuple[Mapping[str, BackboneSpec], tuple[str, ...]]:
    """Return the rows of the family that shapes belong to, and its visible fields."""
    if "focal_levels" in shapes:
        return FOCALNETS, VISIBLE_FIELDS
    return focal_transformer.rows_of(shapes)


def _visible_value(spec: BackboneSpec, name: str) -> Any:
    """Return a field of a variant, as far as shapes reveal it."""
    value = getattr(spec, name)
    return value is not None if name == "layer_scale" else value


def _difference(shapes: Mapping[str, Any], spec: BackboneSpec) -> list[str]:
    _, fields = _rows(shapes)
    return [name for name in fields if shapes[name] != _visible_value(spec, name)]


def match_variant(shapes: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Find the variant that shapes belong to, and the windows or channels that differ from it."""
    channels = {} if shapes["in_channels"] == 3 else {"in_channels": shapes["in_channels"]}
    choices: tuple[list[str], ...] = ([], ["focal_windows"])
    rows, _ = _rows(shapes)
    for allowed in choices:
        for name, spec in rows.items():
            if _difference(shapes, spec) == allowed:
                return name, {field: shapes[field] for field in allowed} | channels
    return None


def nearest_variants(shapes: Mapping[str, Any]) -> list[str]:
    """Return the three most similar variants, each with its first difference."""
    rows, _ = _rows(shapes)
    ranked = sorted(rows, key=lambda name: len(_difference(shapes, rows[name])))
    texts = []
    for name in ranked[:3]:
        first = _difference(shapes, rows[name])[0]
        expected = _visible_value(rows[name], first)
        texts.append(f"{name}, but {first} is {shapes[first]} instead of {expected}")
    return texts
