"""Handle Focal Transformers in checkpoints: names, shapes, sets of closest tokens.

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

# Part of a name that only Focal Transformers have; `attn.qkv` also occurs in Swin Transformers.
MARKER = "pool_layers.0."
_PAIR = ("weight", "bias")
_ATTENTION = "layers.{i}.blocks.{j}.attn"
# Modules of the official code that FocalNet does not have -> their parameters.
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
# Buffers that depend on the image size and are not learned.
DROPS = (
    (
        r"\.attn\.(relative_position_index(_\d+)?|valid_ind_rolled|window_coords"
        r"|topk_cloest_coords_\d+)$",
        "index that is computed for each size",
    ),
)
NEIGHBORS = re.compile(r"^layers\.(\d+)\.blocks\.\d+\.attn\..*_to_neighbors$")
# Also with the prefix that a backbone has in a detector.
SET_NAME = re.compile(rf"^((?:.+\.)?layers\.\d+\.blocks\.\d+\.attn)\.{TOPK_BUFFER}[01]$")
UNUSED_SET = "closest tokens that fit no map size with these windows; computed instead"
FIELDS = ("embed_dim", "depths", "num_heads", "window_size", "conv_embed", "mlp_ratio")
FIELDS_V1 = (*FIELDS, "expand_size", "focal_windows")


def is_focal_transformer(names: Iterable[str]) -> bool:
    """Tell whether official names are those of a Focal Transformer."""
    return f"layers.0.blocks.0.{MARKER}weight" in names


def visible_shapes(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the constructor arguments of the Focal Transformer that names and shapes belong to.

    No shape reveals ``top_k`` of version 2.

    Raises: ValueError or KeyError if they do not belong to a Focal Transformer.
    """
    stem = backbone["patch_embed.proj.weight"]
    matches = (re.match(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.weight$", n) for n in backbone)
    blocks = {(int(m[1]), int(m[2])) for m in matches if m}
    stages = range(1 + max((i for i, _ in blocks), default=-1))
    depths = tuple(1 + max((j for i, j in blocks if i == s), default=-1) for s in stages)
    if stem.ndim != 4 or not depths or 0 in depths:
        raise ValueError("not a Focal Transformer: blocks are missing")
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
    """Return the variants of the version that shapes belong to, and the fields they reveal."""
    first = "expand_size" in shapes
    version = FocalTransformerSpec if first else FocalTransformerV2Spec
    rows = {n: row for n, row in FOCAL_TRANSFORMERS.items() if isinstance(row, version)}
    return rows, FIELDS_V1 if first else FIELDS


def absent_neighbors(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Return the neighbor bias tables of the last stages that a file does not have.

    The official network has none where one window covers the map, as in stage 4 at 224 pixels.

    Returns: names in the network, of whole stages and only at the end of the network.
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


def reads_set(name: str, target: Mapping[str, Tensor]) -> bool:
    """Tell whether a name is a set of closest tokens that a block of the network can read."""
    match = SET_NAME.match(name)
    return match is not None and f"{match[1]}.coord2rpb_all.0.0.weight" in target


def unused_sets(net: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the loaded sets of closest tokens that a network does not use."""
    unused = []
    for name in names:
        match = SET_NAME.match(name)
        if match:
            module = net.get_submodule(match[1])
            if isinstance(module, NearestAttention) and getattr(module, f"{TOPK_BUFFER}0") is None:
                unused.append(name)
    return unused


def notes(net: nn.Module, absent: Iterable[str]) -> list[str]:
    """Return notes for the load report of a network that has just been loaded.

    Args:
        net: network.
        absent: neighbor bias tables that the file does not have.
    """
    found = []
    stages = sorted({f"stage {int(name.split('.')[1]) + 1}" for name in absent})
    if stages:
        found.append(
            f"The file has no neighbor tables in {', '.join(stages)}, where one window covered the "
            "maps in its training: they have random values and are used on larger maps only."
        )
    sizes = {
        f"{module._stored.size.height}x{module._stored.size.width}"
        for module in net.modules()
        if isinstance(module, NearestAttention) and module._stored is not None
    }
    if sizes:
        found.append(
            f"The file's sets of closest tokens are used on maps of {', '.join(sorted(sizes))}."
        )
    return found
