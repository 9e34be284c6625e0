"""The FPN builders refuse values that end in assertions, late errors or none."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.necks.fpn import build_fpn, build_retinanet_fpn

BAD: list[tuple[dict[str, Any], str]] = [
    ({"out_channels": 0}, "out_channels must be an integer between 1 and .* got 0"),
    ({"out_channels": -256}, "out_channels must be an integer between 1 and .* got -256"),
    ({"out_channels": 256.0}, r"out_channels .* got 256\.0"),
    ({"out_channels": 10**9}, "out_channels .* between 1 and 8192, got 1000000000"),
    ({"out_channels": 40, "norm": "GN"}, "norm 'GN' does not fit out_channels=40: .*divisible"),
    ({"norm": "BatchNorm"}, "Unknown norm 'BatchNorm'. Known: BN, SyncBN"),
    ({"fuse_type": "mean"}, "Unknown fuse_type 'mean'. Known: avg, sum"),
    ({"in_features": ("stage2", "stage4")}, "contiguous .* got stage2, stage4 with strides 8, 32"),
    (
        {"in_features": ("stage3", "stage2")},
        "fine to coarse, got stage3, stage2 with strides 16, 8",
    ),
    ({"in_features": ("stage2", "stage2")}, "strides 8, 8"),
    ({"in_features": "stage2"}, "in_features must be a list of names, got 'stage2'"),
    ({"in_features": ("p2",)}, "no feature p2; it returns stage1, stage2, stage3, stage4"),
]


@pytest.mark.parametrize("build", [build_fpn, build_retinanet_fpn])
@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_values_are_named(
    build: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(focalnet_backbone("focalnet_nano", embed_dim=8, depths=(1,) * 4), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"p6_from": "p4"}, "p6_from 'p4'"), ({"p7_relu": "no"}, "p7_relu must be True or False")],
)
def test_bad_values_of_the_extra_levels(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_retinanet_fpn(focalnet_backbone("focalnet_nano"), **options)
