"""Names of DINO's parameters in the files of FocalNet-DINO and detrex, and what a file holds.

Our names are those of FocalNet-DINO, whose decoder layers share one class layer and one box head:
its files repeat their tensors for each layer, ours hold them once. No tensor of the public files
shows the conventions that they belong to, their names do; files saved here hold the temperature
of the position encoding.
Source: FocalNet/FocalNet-DINO:models/dino/dino.py; IDEA-Research/detrex:projects/dino/modeling.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...heads.dino.dino_conventions import CONVENTIONS, conventions_by_temperature
from .name_pairs import (
    NamePairs,
    count,
    focal_backbone,
    pairs,
    read_names,
    split_backbone,
    write_names,
)

MARK = "position_temperature"
ENCODER, DECODER = "transformer.encoder.layers.", "transformer.decoder.layers."
READS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
BACKBONES = {"focalnet_dino": "backbone.0.", "detrex": "backbone."}


@dataclass(frozen=True, kw_only=True)
class DINOSizes:
    """Numbers that decide which parameters a DINO has.

    Attributes:
        encoder_layers, decoder_layers: numbers of layers.
        levels: that the transformer reads.
        features: of the backbone among them; the others are made by convolutions.
    """

    encoder_layers: int
    decoder_layers: int
    levels: int
    features: int


@dataclass(frozen=True, kw_only=True)
class DINOFile:
    """Description of a DINO that its weights give.

    Attributes:
        conventions: key of ``CONVENTIONS``.
        rows: of the class layers: 80 for COCO's classes, 91 for COCO's ids.
        queries: most boxes of an image.
        sizes: numbers of layers and levels.
    """

    conventions: str
    rows: int
    queries: int
    sizes: DINOSizes


def find_layout(names: Mapping[str, Tensor]) -> str | None:
    """Return whose names a whole DINO has, "focalnet_dino" or "detrex"; None for others' and ours.

    A file of the backbone alone is none either.
    """
    if MARK in names or not {"class_embed.0.weight", "label_enc.weight"} <= set(names):
        return None
    if "transformer.level_embeds" in names and "neck.convs.0.conv.weight" in names:
        return "detrex"
    if {"transformer.level_embed", "transformer.enc_out_class_embed.weight"} <= set(names):
        return "focalnet_dino"
    return None


def is_ours(names: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict is that of a DINO of this package."""
    return MARK in names and "transformer.tgt_embed.weight" in names


def to_ours(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return the tensors of a public DINO by our names, the temperature included.

    Raises: ValueError if a name is missing or unknown, or shared tensors differ.
    """
    backbone, others = split_backbone(state)
    title = CONVENTIONS[layout].title
    table = name_pairs_of(layout, _sizes(others, layout))
    result = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    result |= read_names(others, table, f"{title}'s DINO")
    return result | {MARK: torch.tensor(CONVENTIONS[layout].temperature)}


def to_public(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return the tensors of our model by the names of a public layout, the inverse of `to_ours`.

    Raises: ValueError if the model has other conventions, or a backbone of other names.
    """
    own = conventions_by_temperature(float(state[MARK]))
    if own != layout:
        raise ValueError(
            f"This model has the conventions of {CONVENTIONS[own].title}, under which its weights "
            f"make sense; files of {CONVENTIONS[layout].title} have others: write it as {own}."
        )
    title = CONVENTIONS[layout].title
    backbone, others = focal_backbone(state, title)
    del others[MARK]
    table = name_pairs_of(layout, _sizes(others, "ours"))
    written = {f"{BACKBONES[layout]}{name}": tensor for name, tensor in backbone.items()}
    return written | write_names(others, table, f"{title}'s DINO")


def inspect_dino(state: Mapping[str, Tensor]) -> DINOFile | None:
    """Return what the weights of a whole DINO say about it, None for other weights.

    Raises: ValueError as `to_ours`.
    """
    layout = find_layout(state)
    ours = to_ours(state, layout) if layout is not None else state
    if not is_ours(ours):
        return None
    return DINOFile(
        conventions=conventions_by_temperature(float(ours[MARK])),
        rows=len(ours["class_embed.0.weight"]),
        queries=len(ours["transformer.tgt_embed.weight"]),
        sizes=_sizes(ours, "ours"),
    )


def _sizes(state: Mapping[str, Tensor], layout: str) -> DINOSizes:
    if layout == "detrex":
        features = count(state, "neck.convs.")
        levels = features + count(state, "neck.extra_convs.")
    else:
        levels = count(state, "input_proj.")
        kernels = [state.get(f"input_proj.{i}.0.weight") for i in range(levels)]
        features = sum(k is not None and k.shape[-1] == 1 for k in kernels)
    return DINOSizes(
        encoder_layers=count(state, ENCODER),
        decoder_layers=count(state, DECODER),
        levels=levels,
        features=features,
    )


def name_pairs_of(layout: str, sizes: DINOSizes) -> NamePairs:
    """Return the names of all parameters outside the backbone.

    Args:
        layout: "focalnet_dino" or "detrex".
    """
    same = ("enc_output", "enc_output_norm", "decoder.norm")
    names = [f"transformer.{name}" for name in same]
    names += [f"transformer.decoder.ref_point_head.layers.{k}" for k in range(2)]
    table = pairs({name: [name] for name in names})
    for name in ("transformer.tgt_embed.weight", "label_enc.weight"):
        table[name] = (name,)
    return table | (_detrex if layout == "detrex" else _focalnet_dino)(sizes)


def _heads(
    ours: str, index: range, owners: tuple[str, ...] = ("", "transformer.decoder.")
) -> NamePairs:
    """Return the names of a class layer and box layers that files list under some indices.

    Args:
        ours: template of our module, with {kind} for "class_embed" and "bbox_embed".
        index: of the heads in the file that have this tensor.
    """
    modules = {}
    for kind, parts in (
        ("class_embed", ("",)),
        ("bbox_embed", tuple(f".layers.{k}" for k in range(3))),
    ):
        for part in parts:
            modules[ours.format(kind=kind) + part] = [
                f"{owner}{kind}.{i}{part}" for owner in owners for i in index
            ]
    return pairs(modules)


def _focalnet_dino(sizes: DINOSizes) -> NamePairs:
    modules = [f"input_proj.{i}.{part}" for i in range(sizes.levels) for part in range(2)]
    encoder = (*(f"self_attn.{read}" for read in READS), "norm1", "norm2", "linear1", "linear2")
    decoder = (*(f"cross_attn.{read}" for read in READS), "self_attn.out_proj", "norm3")
    modules += [f"{ENCODER}{i}.{m}" for i in range(sizes.encoder_layers) for m in encoder]
    modules += [
        f"{DECODER}{i}.{m}"
        for i in range(sizes.decoder_layers)
        for m in (*decoder, *encoder[len(READS) :])
    ]
    table = pairs({name: [name] for name in modules})
    single = ["transformer.level_embed"]
    single += [
        f"{DECODER}{i}.self_attn.in_proj_{part}"
        for i in range(sizes.decoder_layers)
        for part in ("weight", "bias")
    ]
    table |= {name: (name,) for name in single}
    table |= _heads("{kind}.0", range(sizes.decoder_layers))
    encoder_heads = [
        "transformer.enc_out_class_embed",
        *(f"transformer.enc_out_bbox_embed.layers.{k}" for k in range(3)),
    ]
    return table | pairs({name: [name] for name in encoder_heads})


_DETREX_ENCODER = {
    **{f"self_attn.{read}": f"attentions.0.{read}" for read in READS},
    "norm1": "norms.0",
    "norm2": "norms.1",
    "linear1": "ffns.0.layers.0.0",
    "linear2": "ffns.0.layers.1",
}
_DETREX_DECODER = {
    **{f"cross_attn.{read}": f"attentions.1.{read}" for read in READS},
    "self_attn.out_proj": "attentions.0.attn.out_proj",
    "norm2": "norms.0",
    "norm1": "norms.1",
    "norm3": "norms.2",
    "linear1": "ffns.0.layers.0.0",
    "linear2": "ffns.0.layers.1",
}


def _detrex(sizes: DINOSizes) -> NamePairs:
    modules: dict[str, list[str]] = {}
    for i in range(sizes.levels):
        further = i - sizes.features
        theirs = f"neck.convs.{i}" if further < 0 else f"neck.extra_convs.{further}"
        modules |= {
            f"input_proj.{i}.0": [f"{theirs}.conv"],
            f"input_proj.{i}.1": [f"{theirs}.norm"],
        }
    for prefix, layers, rows in (
        (ENCODER, sizes.encoder_layers, _DETREX_ENCODER),
        (DECODER, sizes.decoder_layers, _DETREX_DECODER),
    ):
        for i in range(layers):
            modules |= {f"{prefix}{i}.{a}": [f"{prefix}{i}.{b}"] for a, b in rows.items()}
    table = pairs(modules)
    table["transformer.level_embed"] = ("transformer.level_embeds",)
    for i in range(sizes.decoder_layers):
        for part in ("weight", "bias"):
            table[f"{DECODER}{i}.self_attn.in_proj_{part}"] = (
                f"{DECODER}{i}.attentions.0.attn.in_proj_{part}",
            )
        table |= _heads(f"{{kind}}.{i}", range(i, i + 1))
    last = range(sizes.decoder_layers, sizes.decoder_layers + 1)
    return table | _heads("transformer.enc_out_{kind}", last)
