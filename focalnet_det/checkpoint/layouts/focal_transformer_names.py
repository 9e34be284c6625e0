"""Focal Transformers in checkpoints: names, what shapes reveal, sets of closest tokens.

Source: microsoft/Focal-Transformer:classification/focal_transformer.py, focal_transformer_v2.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...backbones.attention import TOPK_BUFFER, NearestAttention
from ...backbones.variants import FOCAL_TRANSFORMERS, FocalTransformerSpec, FocalTransformerV2Spec
from ...ops.window_layout import neighbor_columns

# In the names of both versions, and in no other network's: Swin Transformers have `attn.qkv` too.
SIGN = "pool_layers.0."
_PAIR = ("weight", "bias")
_ATTENTION = "layers.{i}.blocks.{j}.attn"
# Modules of the official code that FocalNet does not have, and their parameters.
MODULES: Mapping[str, tuple[str, ...]] = {
    "layers.{i}.blocks.{j}.pool_layers.0": _PAIR,
    f"{_ATTENTION}.qkv": _PAIR,
    f"{_ATTENTION}.proj": _PAIR,
    f"{_ATTENTION}.relative_position_bias_table": ("",),
    f"{_ATTENTION}.relative_position_bias_table_to_neighbors": ("",),
    f"{_ATTENTION}.relative_position_bias_table_to_windows.0": ("",),
    f"{_ATTENTION}.coord2rpb_all.{{k}}.0": _PAIR,
    f"{_ATTENTION}.coord2rpb_all.{{k}}.2": _PAIR,
    f"{_ATTENTION}.{TOPK_BUFFER}0": ("",),
    f"{_ATTENTION}.{TOPK_BUFFER}1": ("",),
}
# Buffers of files that belong to one size of image and hold nothing that was learned.
DROPS = (
    (
        r"\.attn\.(relative_position_index(_\d+)?|valid_ind_rolled|window_coords"
        r"|topk_cloest_coords_\d+)$",
        "index that is made for each size",
    ),
)
NEIGHBORS = re.compile(r"^layers\.(\d+)\.blocks\.\d+\.attn\..*_to_neighbors$")
# Also with the prefix that a backbone has in a detector.
SET = re.compile(rf"^((?:.+\.)?layers\.\d+\.blocks\.\d+\.attn)\.{TOPK_BUFFER}[01]$")
UNUSED_SET = "closest tokens of no size of map that these windows have; found anew"
FIELDS = ("embed_dim", "depths", "num_heads", "window_size", "conv_embed", "mlp_ratio")
FIELDS_V1 = (*FIELDS, "expand_size", "focal_windows")


def is_focal_transformer(names: Iterable[str]) -> bool:
    """Tell whether official names are those of a Focal Transformer."""
    return f"layers.0.blocks.0.{SIGN}weight" in names


def visible_shapes(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the constructor arguments of the Focal Transformer that names and shapes belong to.

    ``top_k`` of version 2 is in no shape.

    Raises: ValueError or KeyError if they are those of no Focal Transformer.
    """
    stem = backbone["patch_embed.proj.weight"]
    matches = (re.match(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.weight$", n) for n in backbone)
    blocks = {(int(m[1]), int(m[2])) for m in matches if m}
    stages = range(1 + max((i for i, _ in blocks), default=-1))
    depths = tuple(1 + max((j for i, j in blocks if i == s), default=-1) for s in stages)
    if stem.ndim != 4 or not depths or 0 in depths:
        raise ValueError("no Focal Transformer: blocks are missing")
    first = [f"layers.{stage}.blocks.0" for stage in stages]
    side = math.isqrt(backbone[f"{first[0]}.pool_layers.0.weight"].shape[1])
    hidden, dim = backbone[f"{first[0]}.mlp.fc1.weight"].shape
    result = {
        "in_channels": stem.shape[1],
        "embed_dim": stem.shape[0],
        "depths": depths,
        "mlp_ratio": hidden / dim,
        "window_size": side,
        "conv_embed": stem.shape[-1] == 7,
    }
    if f"{first[0]}.attn.coord2rpb_all.0.2.weight" in backbone:
        heads = [backbone[f"{b}.attn.coord2rpb_all.0.2.weight"].shape[0] for b in first]
        return result | {"num_heads": tuple(heads)}
    table = "attn.relative_position_bias_table"
    pooled = [backbone[f"{b}.{table}_to_windows.0"].shape for b in first]
    columns = {t.shape[-1] for n, t in backbone.items() if NEIGHBORS.match(n)}
    sizes = [e for e in range(side // 2 + 1) if neighbor_columns(side, e) in columns]
    return result | {
        "num_heads": tuple(backbone[f"{b}.{table}"].shape[1] for b in first),
        "focal_windows": tuple(math.isqrt(shape[1]) - side + 1 for shape in pooled),
        "expand_size": sizes[0] if sizes else 0,
    }


def rows_of(
    shapes: Mapping[str, Any],
) -> tuple[dict[str, FocalTransformerSpec | FocalTransformerV2Spec], tuple[str, ...]]:
    """Return the rows of the version that shapes belong to, and the fields that shapes reveal."""
    first = "expand_size" in shapes
    version = FocalTransformerSpec if first else FocalTransformerV2Spec
    rows = {n: row for n, row in FOCAL_TRANSFORMERS.items() if isinstance(row, version)}
    return rows, FIELDS_V1 if first else FIELDS


def absent_neighbors(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Return tables of neighbors of the last stages that a file lacks, as for small images.

    Where one window covers a map the official network has no neighbors: at 224 in stage 4.

    Returns: names in the network; none if a stage has some of its tables, or a later stage has.
    """
    stages: dict[int, list[str]] = {}
    for name in target:
        match = NEIGHBORS.match(name)
        if match:
            stages.setdefault(int(match[1]), []).append(name)
    absent: list[str] = []
    for stage in sorted(stages, reverse=True):
        if stage == 0 or any(name in tensors for name in stages[stage]):
            break
        absent += stages[stage]
    return absent


def takes_set(name: str, target: Mapping[str, Tensor]) -> bool:
    """Tell whether a name is that of a set of closest tokens that the network's block reads."""
    match = SET.match(name)
    return match is not None and f"{match[1]}.coord2rpb_all.0.0.weight" in target


def unused_sets(net: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the loaded sets of closest tokens that a network does not use."""
    unused = []
    for name in names:
        match = SET.match(name)
        if match:
            module = net.get_submodule(match[1])
            if isinstance(module, NearestAttention) and getattr(module, f"{TOPK_BUFFER}0") is None:
                unused.append(name)
    return unused


def notes(net: nn.Module, absent: Iterable[str]) -> list[str]:
    """Return what a loader should say about a network that has just got its weights."""
    found = []
    stages = sorted({f"stage {int(name.split('.')[1]) + 1}" for name in absent})
    if stages:
        found.append(
            f"The file has no neighbor tables in {', '.join(stages)}, where one window covered the "
            "map it was trained on; they start at random and are read on larger maps alone."
        )
    sizes = {
        f"{module._stored.size.height}x{module._stored.size.width}"
        for module in net.modules()
        if isinstance(module, NearestAttention) and module._stored is not None
    }
    if sizes:
        found.append(
            f"Sets of closest tokens of the file are used on maps of {', '.join(sorted(sizes))}."
        )
    return found
