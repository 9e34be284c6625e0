"""Build Detectron2's FPN on any backbone, with channels and strides from ``output_shape()``."""

import itertools
from collections.abc import Sequence

from detectron2.layers import get_norm
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor

from ..layers.checks import check_flag, check_integer


def build_fpn(
    bottom_up: Backbone,
    *,
    in_features: Sequence[str] | None = None,
    out_channels: int = 256,
    norm: str = "",
    fuse_type: str = "sum",
) -> FPN:
    """Build an FPN with a max-pooled last level: stage1..stage4 become p2..p6.

    Args:
        bottom_up: backbone.
        in_features: names of contiguous features, fine to coarse; None or empty for all outputs.
        out_channels: channels of every level.
        norm: norm of the convolutions, as in Detectron2's ``get_norm``; "" for none.
        fuse_type: "sum" or "avg".
    Raises: ValueError for features that the backbone does not have, features whose strides do not
        double from one to the next, and other invalid values.
    Source: arXiv:1612.03144; detectron2:modeling/backbone/fpn.py.
    """
    _check_fpn_options(out_channels, norm, fuse_type)
    return FPN(
        bottom_up=bottom_up,
        in_features=resolve_in_features(bottom_up, in_features),
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
    p6_from: str = "backbone",
    p7_relu: bool = True,
) -> FPN:
    """Build an FPN with two strided convolutions on top: stage2..4 become p3..p7.

    Args:
        bottom_up, in_features, out_channels, norm, fuse_type: as in :func:`build_fpn`; by default
            the feature of stride 4 is left out.
        p6_from: input of p6: "backbone" for its last feature, or "p5".
        p7_relu: apply a ReLU between the two convolutions, as Detectron2 does and mmdet does not.
    Raises: ValueError as in :func:`build_fpn`, or for an unknown ``p6_from``.
    Source: arXiv:1708.02002, section 4; detectron2:modeling/backbone/fpn.py (LastLevelP6P7).
    """
    _check_fpn_options(out_channels, norm, fuse_type)
    check_flag("p7_relu", p7_relu)
    if p6_from not in ("backbone", "p5"):
        raise ValueError(f"Unknown p6_from {p6_from!r}. Known: backbone, p5.")
    coarser = [name for name, shape in bottom_up.output_shape().items() if shape.stride > 4]
    names = resolve_in_features(bottom_up, in_features or coarser)
    freeze_unused_norms(bottom_up, names)
    last = names[-1]
    channels = bottom_up.output_shape()[last].channels
    if p6_from == "p5":
        last, channels = p6_from, out_channels
    top_block = LastLevelP6P7 if p7_relu else LastLevelP6P7WithoutReLU
    return FPN(
        bottom_up=bottom_up,
        in_features=names,
        out_channels=out_channels,
        norm=norm,
        top_block=top_block(channels, out_channels, in_feature=last),
        fuse_type=fuse_type,
    )


def freeze_unused_norms(bottom_up: Backbone, in_features: Sequence[str]) -> None:
    """Freeze the output norms of features that the neck does not use.

    They get no gradient, and DistributedDataParallel refuses trainable parameters without one.

    Args:
        bottom_up: backbone; its norms are frozen in place.
        in_features: names of the features that the neck uses.
    """
    for i, name in enumerate(("stage1", "stage2", "stage3", "stage4")):
        norm = getattr(bottom_up, f"norm{i}", None)
        if norm is not None and name not in in_features:
            norm.requires_grad_(False)


class LastLevelP6P7WithoutReLU(LastLevelP6P7):
    """Detectron2's two extra levels without the ReLU between them, as in mmdet.

    Source: open-mmlab/mmdetection:mmdet/models/necks/fpn.py (``relu_before_extra_convs=False``).
    """

    def forward(self, c5: Tensor) -> list[Tensor]:
        """Return p6 and p7, (N, C, H / 2, W / 2) and (N, C, H / 4, W / 4), of c5 (N, C5, H, W)."""
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


def _check_fpn_options(out_channels: int, norm: str, fuse_type: str) -> None:
    """Check the arguments that both builders share.

    Raises: ValueError that names the argument, its value and what is allowed.
    """
    check_integer("out_channels", out_channels, 1, 8192)
    if fuse_type not in ("sum", "avg"):
        raise ValueError(f"Unknown fuse_type {fuse_type!r}. Known: avg, sum.")
    try:
        get_norm(norm, out_channels)
    except KeyError as error:
        raise ValueError(
            f"Unknown norm {norm!r}. Known: BN, SyncBN, FrozenBN, GN, and an empty string for none."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"The norm {norm!r} does not fit out_channels={out_channels}: {error}."
        ) from error


def resolve_in_features(bottom_up: Backbone, in_features: Sequence[str] | None) -> list[str]:
    """Return the checked feature names; None or empty selects all outputs of the backbone.

    Raises: ValueError for unknown features, or strides that do not double from one to the next.
    """
    shapes = bottom_up.output_shape()
    if isinstance(in_features, str):
        raise ValueError(f"in_features must be a list of names, got {in_features!r}.")
    unknown = [name for name in in_features or () if name not in shapes]
    if unknown:
        raise ValueError(
            f"The backbone has no feature {', '.join(unknown)}; it returns {', '.join(shapes)}."
        )
    names = list(in_features or shapes)
    strides = [shapes[name].stride for name in names]
    if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(
            f"in_features must be contiguous and ordered from fine to coarse, got "
            f"{', '.join(names)} with strides {', '.join(map(str, strides))}."
        )
    return names
