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

HEAD = "sem_seg_head."
PIXEL_DECODER = f"{HEAD}pixel_decoder."
PREDICTOR = f"{HEAD}predictor."
HF_PIXELS = "model.pixel_level_module.decoder."
HF_QUERIES = "model.transformer_module."
HF_BACKBONE = "model.pixel_level_module.encoder."

# (pattern, replacement), the first that fits the whole name is taken.
_ENCODER_LAYER = f"{PIXEL_DECODER}transformer.encoder.layers."
FROM_TRANSFORMERS = (
    (rf"{HF_PIXELS}level_embed", f"{PIXEL_DECODER}transformer.level_embed"),
    (rf"{HF_PIXELS}input_projections\.(.*)", rf"{PIXEL_DECODER}input_proj.\1"),
    (rf"{HF_PIXELS}encoder\.layers\.(\d+)\.self_attn\.(.*)", rf"{_ENCODER_LAYER}\1.self_attn.\2"),
    (
        rf"{HF_PIXELS}encoder\.layers\.(\d+)\.self_attn_layer_norm(.*)",
        rf"{_ENCODER_LAYER}\1.norm1\2",
    ),
    (rf"{HF_PIXELS}encoder\.layers\.(\d+)\.final_layer_norm(.*)", rf"{_ENCODER_LAYER}\1.norm2\2"),
    (rf"{HF_PIXELS}encoder\.layers\.(\d+)\.fc([12])(.*)", rf"{_ENCODER_LAYER}\1.linear\2\3"),
    (rf"{HF_PIXELS}(adapter|layer)_1\.0\.(.*)", rf"{PIXEL_DECODER}\1_1.\2"),
    (rf"{HF_PIXELS}(adapter|layer)_1\.1\.(.*)", rf"{PIXEL_DECODER}\1_1.norm.\2"),
    (rf"{HF_PIXELS}mask_projection(.*)", rf"{PIXEL_DECODER}mask_features\1"),
    (rf"{HF_QUERIES}queries_embedder(.*)", rf"{PREDICTOR}query_embed\1"),
    (rf"{HF_QUERIES}queries_features(.*)", rf"{PREDICTOR}query_feat\1"),
    (rf"{HF_QUERIES}level_embed(.*)", rf"{PREDICTOR}level_embed\1"),
    (
        rf"{HF_QUERIES}decoder\.layers\.(\d+)\.self_attn_layer_norm(.*)",
        rf"{PREDICTOR}transformer_self_attention_layers.\1.norm\2",
    ),
    (
        rf"{HF_QUERIES}decoder\.layers\.(\d+)\.self_attn\.(.*)",
        rf"{PREDICTOR}transformer_self_attention_layers.\1.self_attn.\2",
    ),
    (
        rf"{HF_QUERIES}decoder\.layers\.(\d+)\.cross_attn_layer_norm(.*)",
        rf"{PREDICTOR}transformer_cross_attention_layers.\1.norm\2",
    ),
    (
        rf"{HF_QUERIES}decoder\.layers\.(\d+)\.cross_attn\.(.*)",
        rf"{PREDICTOR}transformer_cross_attention_layers.\1.multihead_attn.\2",
    ),
    (
        rf"{HF_QUERIES}decoder\.layers\.(\d+)\.final_layer_norm(.*)",
        rf"{PREDICTOR}transformer_ffn_layers.\1.norm\2",
    ),
    (
        rf"{HF_QUERIES}decoder\.layers\.(\d+)\.fc([12])(.*)",
        rf"{PREDICTOR}transformer_ffn_layers.\1.linear\2\3",
    ),
    (rf"{HF_QUERIES}decoder\.layernorm(.*)", rf"{PREDICTOR}decoder_norm\1"),
    (
        rf"{HF_QUERIES}decoder\.mask_predictor\.mask_embedder\.(\d+)\.0(.*)",
        rf"{PREDICTOR}mask_embed.layers.\1\2",
    ),
    (r"class_predictor(.*)", rf"{PREDICTOR}class_embed\1"),
    (r"(criterion\.empty_weight)", r"\1"),
)

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
        state: of the original, old files included, or of transformers, whose backbone is left out:
            it is that of another library.
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


def _renamed_old(name: str) -> str:
    """Return the present name of a parameter of any file of the original."""
    if name.startswith(HEAD) and not name.startswith((PREDICTOR, PIXEL_DECODER)):
        name = PIXEL_DECODER + name.removeprefix(HEAD)
    return name.replace("static_query", "query_feat")


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, value in state.items():
        if name.startswith(HF_BACKBONE):
            continue
        for pattern, replacement in FROM_TRANSFORMERS:
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, replacement, name)] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} names of this file have no place in Mask2Former, such as {unknown[0]}."
        )
    return _joined_projections(renamed)


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
        encoder_layers=_layers(ours, f"{PIXEL_DECODER}transformer.encoder.layers."),
        decoder_layers=_layers(ours, f"{PREDICTOR}transformer_ffn_layers."),
        backbone=backbone,
        tasks=PUBLISHED_CLASSES.get(num_classes, ()),
    )


def _layers(names: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
