"""Names of Mask2Former's parameters in the public files, and what a file holds.

Our names are those of the original (facebookresearch/Mask2Former), old files of which lack a prefix
and call the content of the queries otherwise. Those of transformers are translated: there,
queries, keys and values of self-attention are projected by three layers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .name_pairs import (
    NamePairs,
    count,
    focal_backbone,
    pairs,
    read_names,
    split_backbone,
    write_names,
)

HEAD = "sem_seg_head."
PIXEL_DECODER = f"{HEAD}pixel_decoder."
PREDICTOR = f"{HEAD}predictor."
HF_PIXELS = "model.pixel_level_module.decoder."
HF_QUERIES = "model.transformer_module."
HF_BACKBONE = "model.pixel_level_module.encoder."
_ENCODER = f"{PIXEL_DECODER}transformer.encoder.layers."
_READS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")

Layout = Literal["original", "old original", "transformers"]


def find_layout(names: Mapping[str, Tensor]) -> Layout | None:
    """Return which layout of Mask2Former the names of a file have, None if none."""
    if any(name.startswith((HF_PIXELS, HF_QUERIES)) for name in names):
        return "transformers"
    if f"{PREDICTOR}query_feat.weight" in names and f"{PIXEL_DECODER}mask_features.weight" in names:
        return "original"
    if f"{PREDICTOR}query_embed.weight" in names and any(
        name.startswith((f"{PREDICTOR}static_query", f"{HEAD}mask_features", PIXEL_DECODER))
        for name in names
    ):
        return "old original"
    return None


def translate_mask2former(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a public Mask2Former by our names.

    Args:
        state: of the original, old files included, or of transformers. The backbone of the latter
            is left out, unless it is a FocalNet: it has names of its own.
    Raises: ValueError if the layout is none of these, or a name has no place in it.
    """
    layout = find_layout(state)
    if layout is None:
        raise ValueError(
            "These are not the weights of a Mask2Former: neither the original's names "
            f"({PREDICTOR}query_feat.weight) nor those of transformers ({HF_QUERIES}...)."
        )
    if layout == "transformers":
        return _from_transformers(state)
    return {_renamed_old(name): value for name, value in state.items()}


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a whole model of any layout by our names, the backbone's included.

    A backbone of unknown names keeps them.

    Raises: ValueError as `translate_mask2former`.
    """
    translated = translate_mask2former(state)
    if find_layout(state) == "transformers":
        return translated
    try:
        backbone, others = split_backbone(translated)
    except ValueError:
        return translated
    return {f"backbone.{name}": tensor for name, tensor in backbone.items()} | others


def to_public(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of our model by the names of a layout, the inverse of `to_ours`.

    Raises: ValueError if the layout has no name for a tensor.
    """
    if layout == "transformers":
        return transformers_names(state)
    backbone, _ = focal_backbone(state, "Mask2Former")
    written = original_names(state, old=layout == "old original")
    return written | {f"backbone.{name}": tensor for name, tensor in backbone.items()}


def _renamed_old(name: str) -> str:
    """Return the present name of a parameter of any file of the original."""
    if name.startswith(HEAD) and not name.startswith((PREDICTOR, PIXEL_DECODER)):
        name = PIXEL_DECODER + name.removeprefix(HEAD)
    return name.replace("static_query", "query_feat")


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inside = {n.removeprefix(HF_BACKBONE): t for n, t in state.items() if n.startswith(HF_BACKBONE)}
    others = {n: t for n, t in state.items() if not n.startswith(HF_BACKBONE)}
    table = _transformers_names(
        count(others, f"{HF_PIXELS}encoder.layers."),
        count(others, f"{HF_PIXELS}input_projections."),
        count(others, f"{HF_QUERIES}decoder.layers."),
        criterion="criterion.empty_weight" in others,
    )
    head = _joined_projections(read_names(others, table, "Mask2Former of transformers"))
    if not any(name.startswith("focalnet.") for name in inside):
        return head
    return {f"backbone.{n}": t for n, t in split_backbone(inside).backbone.items()} | head


def _transformers_names(
    encoder_layers: int, levels: int, decoder_layers: int, *, criterion: bool
) -> NamePairs:
    """Return our names and those of transformers, projections of self-attention apart."""
    table = _pixel_names(encoder_layers, levels) | _query_names(decoder_layers)
    if criterion:
        table["criterion.empty_weight"] = ("criterion.empty_weight",)
    return table


def _pixel_names(encoder_layers: int, levels: int) -> NamePairs:
    modules = {
        f"{PIXEL_DECODER}adapter_1.norm": f"{HF_PIXELS}adapter_1.1",
        f"{PIXEL_DECODER}layer_1.norm": f"{HF_PIXELS}layer_1.1",
        f"{PIXEL_DECODER}mask_features": f"{HF_PIXELS}mask_projection",
    }
    for i in range(levels):
        for k in range(2):
            modules[f"{PIXEL_DECODER}input_proj.{i}.{k}"] = f"{HF_PIXELS}input_projections.{i}.{k}"
    for i in range(encoder_layers):
        theirs = f"{HF_PIXELS}encoder.layers.{i}."
        modules |= {f"{_ENCODER}{i}.self_attn.{m}": f"{theirs}self_attn.{m}" for m in _READS}
        modules |= {
            f"{_ENCODER}{i}.norm1": f"{theirs}self_attn_layer_norm",
            f"{_ENCODER}{i}.norm2": f"{theirs}final_layer_norm",
            f"{_ENCODER}{i}.linear1": f"{theirs}fc1",
            f"{_ENCODER}{i}.linear2": f"{theirs}fc2",
        }
    single = {
        f"{PIXEL_DECODER}transformer.level_embed": f"{HF_PIXELS}level_embed",
        f"{PIXEL_DECODER}adapter_1.weight": f"{HF_PIXELS}adapter_1.0.weight",
        f"{PIXEL_DECODER}layer_1.weight": f"{HF_PIXELS}layer_1.0.weight",
    }
    return _one_each(modules, single)


def _query_names(decoder_layers: int) -> NamePairs:
    modules = {
        f"{PREDICTOR}decoder_norm": f"{HF_QUERIES}decoder.layernorm",
        f"{PREDICTOR}class_embed": "class_predictor",
    }
    single = {
        f"{PREDICTOR}query_embed.weight": f"{HF_QUERIES}queries_embedder.weight",
        f"{PREDICTOR}query_feat.weight": f"{HF_QUERIES}queries_features.weight",
        f"{PREDICTOR}level_embed.weight": f"{HF_QUERIES}level_embed.weight",
    }
    for k in range(3):
        theirs = f"{HF_QUERIES}decoder.mask_predictor.mask_embedder.{k}.0"
        modules[f"{PREDICTOR}mask_embed.layers.{k}"] = theirs
    for i in range(decoder_layers):
        theirs = f"{HF_QUERIES}decoder.layers.{i}."
        own, cross, feed = (
            f"{PREDICTOR}transformer_{kind}_layers.{i}."
            for kind in ("self_attention", "cross_attention", "ffn")
        )
        modules |= {
            f"{own}norm": f"{theirs}self_attn_layer_norm",
            f"{cross}norm": f"{theirs}cross_attn_layer_norm",
            f"{feed}norm": f"{theirs}final_layer_norm",
            f"{feed}linear1": f"{theirs}fc1",
            f"{feed}linear2": f"{theirs}fc2",
            f"{cross}multihead_attn.out_proj": f"{theirs}cross_attn.out_proj",
        }
        modules |= {f"{own}self_attn.{p}": f"{theirs}self_attn.{p}" for p in _PROJECTIONS}
        for part in ("weight", "bias"):
            single[f"{cross}multihead_attn.in_proj_{part}"] = f"{theirs}cross_attn.in_proj_{part}"
    return _one_each(modules, single)


def _one_each(modules: Mapping[str, str], single: Mapping[str, str]) -> NamePairs:
    """Return the pairs of modules, and of parameters, that have one name on each side."""
    table = pairs({ours: [theirs] for ours, theirs in modules.items()})
    return table | {ours: (theirs,) for ours, theirs in single.items()}


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _joined_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections of queries, keys and values, as ``torch.nn.MultiheadAttention`` does."""
    joined = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*self_attention_layers.*\.)([qkv])_proj\.(weight|bias)", name)
        if found is None:
            joined[name] = value
        elif found[2] == "q":
            parts = [state[f"{found[1]}{part}_proj.{found[3]}"] for part in "qkv"]
            joined[f"{found[1]}in_proj_{found[3]}"] = torch.cat(parts)
    return joined


def _split_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_joined_projections`."""
    result = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*self_attention_layers.*\.)in_proj_(weight|bias)", name)
        if found is None:
            result[name] = value
        else:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                result[f"{found[1]}{part}_proj.{found[2]}"] = rows
    return result


def original_names(state: Mapping[str, Tensor], *, old: bool = False) -> dict[str, Tensor]:
    """Return the tensors of our model by the names of the original.

    Args:
        old: of its first files, which other programs of that time read.
    """
    if not old:
        return dict(state)
    return {
        name.replace(PIXEL_DECODER, HEAD).replace("query_feat", "static_query"): value
        for name, value in state.items()
    }


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the head of our model by the names of transformers, whose backbones are others.

    Raises: ValueError if the model has a parameter that theirs lacks.
    """
    _, others = focal_backbone(state, "transformers")
    table = _transformers_names(
        count(others, _ENCODER),
        count(others, f"{PIXEL_DECODER}input_proj."),
        count(others, f"{PREDICTOR}transformer_ffn_layers."),
        criterion="criterion.empty_weight" in others,
    )
    return write_names(_split_projections(others), table, "Mask2Former of transformers")


@dataclass(frozen=True, kw_only=True)
class Mask2FormerFile:
    """Description of a Mask2Former that its weights give.

    Attributes:
        layout: whose names they have.
        num_classes: without "no object".
        queries: masks of an image.
        decoder_layers, encoder_layers: their numbers.
        backbone: of the names that are known to tell; None for none.
        tasks: that a model of so many classes was published for; the weights do not tell.
    """

    layout: Layout
    num_classes: int
    queries: int
    encoder_layers: int
    decoder_layers: int
    backbone: str | None
    tasks: tuple[str, ...]


# Numbers of classes of the published models: data set, and tasks.
PUBLISHED_CLASSES = {
    150: ("semantic", "panoptic"),
    133: ("panoptic",),
    100: ("instance",),
    80: ("instance",),
    65: ("semantic", "panoptic"),
    19: ("semantic", "panoptic"),
    8: ("instance",),
    40: ("instance",),
}
# A part of a name that only this backbone has.
BACKBONES = {
    "modulation.f.": "FocalNet",
    "relative_position_bias_table": "Swin Transformer",
    "res2.0.conv1": "ResNet",
    "focal": "Focal Transformer",
}


def inspect_mask2former(state: Mapping[str, Tensor]) -> Mask2FormerFile:
    """Return what the weights of a Mask2Former say about it.

    Raises: ValueError as `translate_mask2former` does.
    """
    layout = find_layout(state)
    ours = translate_mask2former(state)
    assert layout is not None
    num_classes = len(ours[f"{PREDICTOR}class_embed.weight"]) - 1
    backbone = next(
        (kind for part, kind in BACKBONES.items() if any(part in n for n in state)), None
    )
    return Mask2FormerFile(
        layout=layout,
        num_classes=num_classes,
        queries=len(ours[f"{PREDICTOR}query_feat.weight"]),
        encoder_layers=count(ours, _ENCODER),
        decoder_layers=count(ours, f"{PREDICTOR}transformer_ffn_layers."),
        backbone=backbone,
        tasks=PUBLISHED_CLASSES.get(num_classes, ()),
    )
