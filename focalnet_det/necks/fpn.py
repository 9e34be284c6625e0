"""Detectron2's feature pyramid on any backbone; shapes come from ``output_shape()``."""

from collections.abc import Sequence

from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7


def build_fpn(
    bottom_up: Backbone,
    *,
    in_features: Sequence[str] | None = None,
    out_channels: int = 256,
    norm: str = "",
    fuse_type: str = "sum",
) -> FPN:
    """FPN with a max-pooled last level: stage1..stage4 become p2..p6.

    Args:
        bottom_up: the backbone.
        in_features: contiguous names, fine to coarse; None or empty takes all outputs.
        out_channels: channels of every level.
        norm: Detectron2's name of a norm for the convolutions, "" for none.
        fuse_type: "sum" or "avg".
    Raises: ValueError for a feature that the backbone does not have.
    Source: arXiv:1612.03144; detectron2:modeling/backbone/fpn.py.
    """
    return FPN(
        bottom_up=bottom_up,
        in_features=checked_features(bottom_up, in_features),
        out_channels=out_channels,
        norm=norm,
        top_block=LastLevelMaxPool(),
        fuse_type=fuse_type,
    )


def build_retinanet_fpn(
    bottom_up: Backbone,
    *,
    in_features: Sequence[str] | None = None,
    out_channels: int = 256,
    norm: str = "",
    fuse_type: str = "sum",
) -> FPN:
    """FPN with two strided convolutions on the last backbone feature: stage2..4 become p3..p7.

    Arguments as in :func:`build_fpn`; by default the stride-4 feature is left out.
    Source: arXiv:1708.02002, section 4; detectron2:modeling/backbone/fpn.py (LastLevelP6P7).
    """
    names = list(in_features or [n for n, s in bottom_up.output_shape().items() if s.stride > 4])
    names = checked_features(bottom_up, names)
    last = names[-1]
    channels = bottom_up.output_shape()[last].channels
    return FPN(
        bottom_up=bottom_up,
        in_features=names,
        out_channels=out_channels,
        norm=norm,
        top_block=LastLevelP6P7(channels, out_channels, in_feature=last),
        fuse_type=fuse_type,
    )


def checked_features(bottom_up: Backbone, in_features: Sequence[str] | None) -> list[str]:
    """The names, or all of the backbone's.

    Raises: ValueError that lists what the backbone has.
    """
    known = list(bottom_up.output_shape())
    unknown = [name for name in in_features or () if name not in known]
    if unknown:
        raise ValueError(
            f"The backbone has no feature {', '.join(unknown)}; it returns {', '.join(known)}."
        )
    return list(in_features or known)
