"""Rename whole models of mmdet's and mmseg's layouts to Detectron2's names and back.

One table of rows per method; which one a file belongs to is told by ``architecture.py``.

For R-CNNs every tensor keeps its shape and order: both sides flatten RoI features as
(C, 7, 7), order anchors by ratio, deltas as dx dy dw dh per class, and put the background last
(mmdet since 2.0). UPerNet's modules are mmseg's own. What weights cannot carry over is listed in
docs/checkpoints.md.
Source: mmdet 2.11 as laid under microsoft/FocalNet:detection, mmseg 0.11 under
microsoft/FocalNet:segmentation; facebookresearch/detectron2.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

from ..architecture import find_method
from .swin_resnet import translate_peer
from .tables import PAIR, Names, fill
from .translate import translate

BACKBONE = "backbone.bottom_up."
# Parameters and buffers of a batch norm.
NORM = (*PAIR, "running_mean", "running_var", "num_batches_tracked")
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DetectorRules:
    """How a method's parts outside the backbone are named on both sides.

    Attributes:
        layout: of the public files, "mmdet" or "mmseg".
        companion: pattern of a name that tells them from Detectron2's.
        backbone: prefix of the backbone in Detectron2's names.
        modules: public module -> Detectron2 module, with weight and bias each.
        norms: the same for batch norms.
        to_detectron2, to_public: pattern of a Detectron2 name -> change of its tensor, for what
            is ordered differently under the same shape; one undoes the other.
    """

    modules: Mapping[str, str]
    layout: str = "mmdet"
    companion: str = r"(neck|roi_head|bbox_head)\."
    backbone: str = BACKBONE
    norms: Mapping[str, str] = field(default_factory=dict)
    to_detectron2: Mapping[str, Change] = field(default_factory=dict)
    to_public: Mapping[str, Change] = field(default_factory=dict)


def _fpn(levels: int, first: int) -> dict[str, str]:
    """Name an FPN over stages: mmdet counts from the finest, Detectron2 names levels by stride."""
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
    """Name the box and mask head of a stage of the published form."""
    theirs, ours = f"roi_head.bbox_head.{k}", f"roi_heads.box_head.{k}"
    masks, own_masks = f"roi_head.mask_head.{k}", f"roi_heads.mask_head.{k}"
    return {
        **{f"{theirs}.shared_convs.{i}.conv": f"{ours}.conv{i + 1}" for i in range(4)},
        f"{theirs}.shared_fcs.0": f"{ours}.fc1",
        f"{theirs}.fc_cls": f"roi_heads.box_predictor.{k}.cls_score",
        f"{theirs}.fc_reg": f"roi_heads.box_predictor.{k}.bbox_pred",
        **{f"{masks}.convs.{i}.conv": f"{own_masks}.mask_fcn{i + 1}" for i in range(4)},
        f"{masks}.upsample": f"{own_masks}.deconv",
        f"{masks}.conv_logits": f"{own_masks}.predictor",
    }


def _other_anchor_order(tensor: Tensor) -> Tensor:
    """Swap ratios and sizes, three of each, in the order of anchors; its own inverse.

    mmdet has the sizes of one ratio next to each other, Detectron2 the ratios of one size.
    """
    return tensor.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


_RETINANET_ORDER = {r"^head\.(cls_score|bbox_pred)\.": _other_anchor_order}

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
            **_fpn(3, first=3),
            "neck.fpn_convs.3.conv": "backbone.top_block.p6",
            "neck.fpn_convs.4.conv": "backbone.top_block.p7",
            **{f"bbox_head.cls_convs.{i}.conv": f"head.cls_subnet.{2 * i}" for i in range(4)},
            **{f"bbox_head.reg_convs.{i}.conv": f"head.bbox_subnet.{2 * i}" for i in range(4)},
            "bbox_head.retina_cls": "head.cls_score",
            "bbox_head.retina_reg": "head.bbox_pred",
        },
        to_detectron2=_RETINANET_ORDER,
        to_public=_RETINANET_ORDER,
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


@cache
def _rows(method: str, reading: bool) -> tuple[Names, list[str]]:
    rules = METHODS[method]
    pairs = [
        (f"{theirs}.{part}", f"{ours}.{part}")
        for modules, parts in ((rules.modules, PAIR), (rules.norms, NORM))
        for theirs, ours in modules.items()
        for part in parts
    ]
    sources, targets = zip(*(pairs if reading else [(b, a) for a, b in pairs]), strict=True)
    return Names(sources), list(targets)


def find_public_method(names: Iterable[str]) -> str | None:
    """Return the method of a model in a public layout, None if no table fits it."""
    names = list(names)
    method = find_method(names)
    if method not in METHODS:
        return None
    return method if any(re.match(METHODS[method].companion, name) for name in names) else None


def find_own_method(names: Iterable[str]) -> str | None:
    """Return the method of a model in Detectron2's names: the one whose table has all of them."""
    names = list(names)
    for method in METHODS:
        others = _outside(names, METHODS[method].backbone)
        rows, _ = _rows(method, False)
        if others and all(rows.find(name) is not None for name in others):
            return method
    return None


def _outside(names: Iterable[str], backbone: str) -> list[str]:
    """Return names outside the backbone; Detectron2's necks are modules beside ``bottom_up``."""
    return [n for n in names if not n.startswith((backbone, "pixel_"))]


def to_detectron2(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return a model of a public layout in Detectron2's names; anything else as it is.

    Returns: the tensors, and the layout they were in ("mmdet", "mmseg" or "detectron2").
    Raises: ValueError if a name of the model is in no row.
    """
    method = find_public_method(tensors)
    if method is None:
        return dict(tensors), "detectron2"
    rules = METHODS[method]
    translation = translate_peer(tensors) or translate(tensors, rules.layout)
    _no_unknown(translation.unknown)
    result = {rules.backbone + name: tensor for name, tensor in translation.backbone.items()}
    return result | _renamed(translation.others, method, True, rules.to_detectron2), rules.layout


def to_public(tensors: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """Undo :func:`to_detectron2`, to the layout of the method's public files.

    Raises: ValueError if a name is in no row of the method's table, KeyError if it has no table.
    """
    if method not in METHODS:
        raise KeyError(f"No table for {method!r}. Known: {', '.join(METHODS)}.")
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
    _no_unknown(unknown)
    return result


def _no_unknown(names: list[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ValueError(
            f"{names[0]}{more} is in no row of the tables for detectors; known methods: "
            f"{', '.join(METHODS)}."
        )
