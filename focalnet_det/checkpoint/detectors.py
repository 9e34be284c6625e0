"""Whole detectors of mmdet's layout to Detectron2's names and back: one table of rows per method.

For Mask R-CNN every tensor keeps its shape and order: both sides flatten RoI features as
(C, 7, 7), order anchors by ratio, deltas as dx dy dw dh per class, and put the background last
(mmdet since 2.0). What weights cannot carry over is listed in docs/checkpoints.md.
Source: mmdet 2.11 as laid under microsoft/FocalNet:detection; facebookresearch/detectron2.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

from .layouts import PAIR, Names, fill
from .translate import translate

BACKBONE = "backbone.bottom_up."
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DetectorRules:
    """How a method's parts outside the backbone are named on both sides.

    Attributes:
        signature: pattern of a name that only this method has in mmdet's layout.
        modules: mmdet module -> Detectron2 module, with weight and bias each.
        to_detectron2, to_mmdet: pattern of a Detectron2 name -> change of its tensor, for what
            is ordered differently under the same shape; one undoes the other.
    """

    signature: str
    modules: Mapping[str, str]
    to_detectron2: Mapping[str, Change] = field(default_factory=dict)
    to_mmdet: Mapping[str, Change] = field(default_factory=dict)


def _fpn(levels: int, first: int) -> dict[str, str]:
    """FPN over stages; mmdet counts from the finest one, Detectron2 names levels by stride."""
    rows = {}
    for i in range(levels):
        rows[f"neck.lateral_convs.{i}.conv"] = f"backbone.fpn_lateral{i + first}"
        rows[f"neck.fpn_convs.{i}.conv"] = f"backbone.fpn_output{i + first}"
    return rows


METHODS: dict[str, DetectorRules] = {
    "mask_rcnn": DetectorRules(
        signature=r"roi_head\.mask_head\.conv_logits\.weight$",
        modules={
            **_fpn(4, first=2),
            "rpn_head.rpn_conv": "proposal_generator.rpn_head.conv",
            "rpn_head.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
            "rpn_head.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
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
}


@cache
def _rows(method: str, reading: bool) -> tuple[Names, list[str]]:
    pairs = [
        (f"{theirs}.{part}", f"{ours}.{part}")
        for theirs, ours in METHODS[method].modules.items()
        for part in PAIR
    ]
    sources, targets = zip(*(pairs if reading else [(b, a) for a, b in pairs]), strict=True)
    return Names(sources), list(targets)


def find_method(names: Mapping[str, Tensor]) -> str | None:
    """The method of a detector in mmdet's layout, None if no table fits it."""
    for method, rules in METHODS.items():
        if any(re.match(rules.signature, name) for name in names):
            return method
    return None


def to_detectron2(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A detector in mmdet's layout in Detectron2's names; anything else as it is.

    Returns: the tensors, and the layout they were in ("mmdet" or "detectron2").
    Raises: ValueError if a name of the detector is in no row.
    """
    method = find_method(tensors)
    if method is None:
        return dict(tensors), "detectron2"
    translation = translate(tensors, "mmdet")
    _no_unknown(translation.unknown)
    result = {BACKBONE + name: tensor for name, tensor in translation.backbone.items()}
    changes = METHODS[method].to_detectron2
    return result | _renamed(translation.others, method, True, changes), "mmdet"


def to_mmdet(tensors: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """The inverse of :func:`to_detectron2`.

    Raises: ValueError if a name is in no row of the method's table, KeyError if it has no table.
    """
    if method not in METHODS:
        raise KeyError(f"No table for {method!r}. Known: {', '.join(METHODS)}.")
    inside = {n.removeprefix(BACKBONE): t for n, t in tensors.items() if n.startswith(BACKBONE)}
    others = {n: t for n, t in tensors.items() if not n.startswith((BACKBONE, "pixel_"))}
    result = {f"backbone.{name}": tensor for name, tensor in inside.items()}
    return result | _renamed(others, method, False, METHODS[method].to_mmdet)


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
