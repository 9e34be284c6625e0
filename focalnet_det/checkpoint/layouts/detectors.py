"""Rename whole models of mmdet and mmseg to Detectron2's names and back.

There is one table of rows per method; ``architecture.py`` finds the method of a file.

The tensors of R-CNNs have the same shape and order on both sides: RoI features are flattened as
(C, 7, 7), anchors are ordered by ratio, deltas are dx dy dw dh per class, and background is the
last class (mmdet since 2.0). UPerNet's modules have mmseg's names. docs/checkpoints.md lists the
differences that weights cannot express.
Source: mmdet 2.11 in microsoft/FocalNet:detection, mmseg 0.11 in microsoft/FocalNet:segmentation;
facebookresearch/detectron2.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

from ..architecture import find_method
from . import dino_names, mask2former_names
from .dense_names import atss_subnets, reppoints_v2
from .swin_resnet import translate_peer
from .tables import PAIR, Names, fill
from .translate import translate

BACKBONE = "backbone.bottom_up."
# Parameters and buffers of a batch norm.
NORM = (*PAIR, "running_mean", "running_var", "num_batches_tracked")
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DetectorRules:
    """Names of the modules of a method outside the backbone, on both sides.

    Attributes:
        modules: public module -> Detectron2 module, with weight and bias each.
        layout: layout of the public files, "mmdet" or "mmseg".
        companion: pattern of a name that only the public files have.
        backbone: prefix of the backbone in Detectron2's names.
        norms: public batch norm -> Detectron2 batch norm.
        tensors: public parameter -> Detectron2 parameter, where it is neither weight nor bias.
        to_detectron2, to_public: pattern of a Detectron2 name -> reordering of its tensor, where
            both sides have the same shape in another order; one is the inverse of the other.
    """

    modules: Mapping[str, str]
    layout: str = "mmdet"
    companion: str = r"(neck|roi_head|bbox_head)\."
    backbone: str = BACKBONE
    norms: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    to_detectron2: Mapping[str, Change] = field(default_factory=dict)
    to_public: Mapping[str, Change] = field(default_factory=dict)


def _fpn(levels: int, first: int) -> dict[str, str]:
    """Return the rows of an FPN: mmdet counts from the finest level, Detectron2 by stride."""
    rows = {}
    for i in range(levels):
        rows[f"neck.lateral_convs.{i}.conv"] = f"backbone.fpn_lateral{i + first}"
        rows[f"neck.fpn_convs.{i}.conv"] = f"backbone.fpn_output{i + first}"
    return rows


_UPERNET_CONVS = {
    **{f"decode_head.psp_modules.{p}.1": f"sem_seg_head.psp_modules.{p}.1" for p in range(4)},
    **{
        f"decode_head.{kind}.{i}": f"sem_seg_head.{kind}.{i}"
        for kind in ("lateral_convs", "fpn_convs")
        for i in range(3)
    },
    "decode_head.bottleneck": "sem_seg_head.bottleneck",
    "decode_head.fpn_bottleneck": "sem_seg_head.fpn_bottleneck",
    "auxiliary_head.convs.0": "sem_seg_head.auxiliary_head.convs.0",
}

_RPN = {
    "rpn_head.rpn_conv": "proposal_generator.rpn_head.conv",
    "rpn_head.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
    "rpn_head.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
}


def _cascade_stage(k: int) -> dict[str, str]:
    """Return the rows of the box and mask heads of a stage of the published cascade."""
    theirs, ours = f"roi_head.bbox_head.{k}", f"roi_heads.box_head.{k}"
    masks, our_masks = f"roi_head.mask_head.{k}", f"roi_heads.mask_head.{k}"
    return {
        **{f"{theirs}.shared_convs.{i}.conv": f"{ours}.conv{i + 1}" for i in range(4)},
        f"{theirs}.shared_fcs.0": f"{ours}.fc1",
        f"{theirs}.fc_cls": f"roi_heads.box_predictor.{k}.cls_score",
        f"{theirs}.fc_reg": f"roi_heads.box_predictor.{k}.bbox_pred",
        **{f"{masks}.convs.{i}.conv": f"{our_masks}.mask_fcn{i + 1}" for i in range(4)},
        f"{masks}.upsample": f"{our_masks}.deconv",
        f"{masks}.conv_logits": f"{our_masks}.predictor",
    }


# Modules of a stage of Sparse R-CNN. Ours have the names of the authors' code.
_DYNAMIC_STAGE = {
    "attention.attn.out_proj": "self_attn.out_proj",
    "attention_norm": "norm1",
    "instance_interactive_conv.dynamic_layer": "inst_interact.dynamic_layer",
    "instance_interactive_conv.norm_in": "inst_interact.norm1",
    "instance_interactive_conv.norm_out": "inst_interact.norm2",
    "instance_interactive_conv.fc_layer": "inst_interact.out_layer",
    "instance_interactive_conv.fc_norm": "inst_interact.norm3",
    "instance_interactive_conv_norm": "norm2",
    "ffn.layers.0.0": "linear1",
    "ffn.layers.1": "linear2",
    "ffn_norm": "norm3",
    "cls_fcs.{j}": "cls_module.{j}",
    "reg_fcs.{j}": "reg_module.{j}",
    "fc_cls": "class_logits",
    "fc_reg": "bboxes_delta",
}
_STAGES = ("roi_head.bbox_head.{i}", "head.head_series.{i}")


def _swap_anchor_order(tensor: Tensor) -> Tensor:
    """Swap ratios and sizes, three of each, in the order of anchors, (9 K, ...); an involution.

    mmdet groups the sizes of one ratio, Detectron2 the ratios of one size.
    """
    return tensor.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


_FPN_P3_TO_P7 = {
    **_fpn(3, first=3),
    "neck.fpn_convs.3.conv": "backbone.top_block.p6",
    "neck.fpn_convs.4.conv": "backbone.top_block.p7",
}


_RETINANET_ORDER = {r"^head\.(cls_score|bbox_pred)\.": _swap_anchor_order}

METHODS: dict[str, DetectorRules] = {
    "mask_rcnn": DetectorRules(
        modules={
            **_fpn(4, first=2),
            **_RPN,
            "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc1",
            "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc2",
            "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
            "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
            **{
                f"roi_head.mask_head.convs.{i}.conv": f"roi_heads.mask_head.mask_fcn{i + 1}"
                for i in range(4)
            },
            "roi_head.mask_head.upsample": "roi_heads.mask_head.deconv",
            "roi_head.mask_head.conv_logits": "roi_heads.mask_head.predictor",
        },
    ),
    "cascade_mask_rcnn": DetectorRules(
        modules={
            **_fpn(4, first=2),
            **_RPN,
            **{theirs: ours for k in range(3) for theirs, ours in _cascade_stage(k).items()},
        },
        norms={
            f"{theirs.removesuffix('.conv')}.bn": f"{ours}.norm"
            for k in range(3)
            for theirs, ours in _cascade_stage(k).items()
            if "shared_convs" in theirs
        },
    ),
    "retinanet": DetectorRules(
        modules={
            **_FPN_P3_TO_P7,
            **{f"bbox_head.cls_convs.{i}.conv": f"head.cls_subnet.{2 * i}" for i in range(4)},
            **{f"bbox_head.reg_convs.{i}.conv": f"head.bbox_subnet.{2 * i}" for i in range(4)},
            "bbox_head.retina_cls": "head.cls_score",
            "bbox_head.retina_reg": "head.bbox_pred",
        },
        to_detectron2=_RETINANET_ORDER,
        to_public=_RETINANET_ORDER,
    ),
    "atss": DetectorRules(
        modules={
            **_FPN_P3_TO_P7,
            **atss_subnets(),
            "bbox_head.atss_cls": "head.cls_score",
            "bbox_head.atss_reg": "head.bbox_pred",
            "bbox_head.atss_centerness": "head.ctrness",
        },
        tensors={"bbox_head.scales.{i}.scale": "head.scales.{i}.scale"},
    ),
    "reppoints_v2": DetectorRules(
        modules=reppoints_v2(),
        tensors={
            f"neck.bi_fpn.{{i}}.{name}.{{j}}.weights": f"backbone.bi_fpn.{{i}}.{name}.{{j}}.weights"
            for name in ("lateral_combine", "out_combine")
        },
    ),
    "sparse_rcnn": DetectorRules(
        modules={
            **_fpn(4, first=2),
            "rpn_head.init_proposal_bboxes": "init_proposal_boxes",
            "rpn_head.init_proposal_features": "init_proposal_features",
            **{f"{_STAGES[0]}.{a}": f"{_STAGES[1]}.{b}" for a, b in _DYNAMIC_STAGE.items()},
        },
        tensors={
            f"{_STAGES[0]}.attention.attn.in_proj_{part}": f"{_STAGES[1]}.self_attn.in_proj_{part}"
            for part in PAIR
        },
    ),
    "upernet": DetectorRules(
        layout="mmseg",
        companion=r"decode_head\.",
        backbone="backbone.",
        modules={
            **{f"{theirs}.conv": f"{ours}.conv" for theirs, ours in _UPERNET_CONVS.items()},
            "decode_head.conv_seg": "sem_seg_head.conv_seg",
            "auxiliary_head.conv_seg": "sem_seg_head.auxiliary_head.conv_seg",
        },
        norms={f"{theirs}.bn": f"{ours}.bn" for theirs, ours in _UPERNET_CONVS.items()},
    ),
}


# Key of a layout of whole models that has modules of its own here -> title for messages.
SET_LAYOUTS = {
    "focalnet_dino": "FocalNet-DINO",
    "detrex": "detrex",
    "mask2former": "Mask2Former",
    "mask2former_old": "the first Mask2Former",
    "mask2former_transformers": "Mask2Former of transformers",
}
_MASK2FORMER_LAYOUTS: dict[str, mask2former_names.Layout] = {
    "mask2former": "original",
    "mask2former_old": "old original",
    "mask2former_transformers": "transformers",
}


@cache
def _rows(method: str, reading: bool) -> tuple[Names, list[str]]:
    rules = METHODS[method]
    pairs = [
        (f"{theirs}.{part}", f"{ours}.{part}")
        for modules, parts in ((rules.modules, PAIR), (rules.norms, NORM))
        for theirs, ours in modules.items()
        for part in parts
    ]
    pairs += rules.tensors.items()
    sources, targets = zip(*(pairs if reading else [(b, a) for a, b in pairs]), strict=True)
    return Names(sources), list(targets)


def find_public_method(names: Iterable[str]) -> str | None:
    """Return the method of a model in a public layout, None if it has no table."""
    names = list(names)
    method = find_method(names)
    if method not in METHODS:
        return None
    return method if any(re.match(METHODS[method].companion, name) for name in names) else None


def find_detectron2_method(names: Iterable[str]) -> str | None:
    """Return the method whose table has all names of a model in Detectron2's names, or None."""
    names = list(names)
    for method in METHODS:
        others = _outside(names, METHODS[method].backbone)
        rows, _ = _rows(method, False)
        if others and all(rows.find(name) is not None for name in others):
            return method
    return None


def _outside(names: Iterable[str], backbone: str) -> list[str]:
    """Return the names outside the backbone; necks are modules next to ``bottom_up``."""
    return [n for n in names if not n.startswith((backbone, "pixel_"))]


def public_layout(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the public layout that a whole model has, None for one saved here or unknown ones.

    The original names of Mask2Former are those of this package too.
    """
    public = find_public_method(tensors)
    if public is not None:
        return METHODS[public].layout
    method = find_method(tensors)
    if method == "mask2former":
        found = mask2former_names.find_layout(tensors)
        return next((key for key, row in _MASK2FORMER_LAYOUTS.items() if row == found), None)
    return dino_names.find_layout(tensors) if method == "dino" else None


def set_to_public(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Rename a DINO or a Mask2Former saved here to a layout of ``SET_LAYOUTS``.

    Raises: ValueError if it is no such model, or the layout has no name for a tensor.
    """
    if layout in _MASK2FORMER_LAYOUTS and mask2former_names.find_layout(tensors) == "original":
        return mask2former_names.to_public(tensors, _MASK2FORMER_LAYOUTS[layout])
    if layout in dino_names.BACKBONES and dino_names.is_ours(tensors):
        return dino_names.to_public(tensors, layout)
    model = "DINO" if layout in dino_names.BACKBONES else "Mask2Former"
    raise ValueError(
        f"Only a whole {model} saved by this package can be written as {layout}; convert a file of "
        "another layout to detectron2 first."
    )


def to_detectron2(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Rename a model of a public layout to Detectron2's names; leave other models unchanged.

    Returns: the tensors, and their former layout ("mmdet", "mmseg", a key of ``SET_LAYOUTS``, or
        "detectron2").
    Raises: ValueError if a name of the model is not in the table of its method.
    """
    layout = public_layout(tensors)
    if layout in dino_names.BACKBONES:
        return dino_names.to_ours(tensors, layout), layout
    if layout in _MASK2FORMER_LAYOUTS:
        return mask2former_names.to_ours(tensors), layout
    method = find_public_method(tensors)
    if method is None:
        return dict(tensors), "detectron2"
    rules = METHODS[method]
    translation = translate_peer(tensors) or translate(tensors, rules.layout)
    _refuse_unknown(translation.unknown)
    result = {rules.backbone + name: tensor for name, tensor in translation.backbone.items()}
    return result | _renamed(translation.others, method, True, rules.to_detectron2), rules.layout


def to_public(tensors: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """Rename a model in Detectron2's names to the layout of the method's public files.

    Raises: ValueError if a name is not in the table of the method, KeyError if it has no table.
    """
    if method not in METHODS:
        raise KeyError(f"There is no table for {method!r}. Known: {', '.join(METHODS)}.")
    rules = METHODS[method]
    outside = _outside(tensors, rules.backbone)
    others = {name: tensors[name] for name in outside}
    result = {
        f"backbone.{name.removeprefix(rules.backbone)}": tensor
        for name, tensor in tensors.items()
        if name.startswith(rules.backbone)
    }
    return result | _renamed(others, method, False, rules.to_public)


def _renamed(
    tensors: Mapping[str, Tensor], method: str, reading: bool, changes: Mapping[str, Change]
) -> dict[str, Tensor]:
    names, targets = _rows(method, reading)
    result, unknown = {}, []
    for name, tensor in tensors.items():
        match = names.find(name)
        if match is None:
            unknown.append(name)
            continue
        renamed = fill(targets[match[0]], match[1])
        detectron2 = renamed if reading else name
        for pattern, change in changes.items():
            if re.search(pattern, detectron2):
                tensor = change(tensor)
        result[renamed] = tensor
    _refuse_unknown(unknown)
    return result


def _refuse_unknown(names: list[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ValueError(
            f"{names[0]}{more} is unknown in models of {', '.join(METHODS)}: other models cannot "
            "be converted."
        )
