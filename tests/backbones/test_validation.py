"""Constructors refuse values that crash, fill the memory or mean something else."""

import inspect
import math
from typing import Any

import pytest
import torch

from focalnet_det import create_backbone, list_backbones
from focalnet_det.backbones import FocalNet, FocalTransformer
from focalnet_det.backbones.validation import MAX_CHANNELS

BAD: dict[str, list[Any]] = {
    "in_channels": [0, -3, 3.0, "3", 10**9],
    "embed_dim": [0, -96, 96.5, None, MAX_CHANNELS],
    "depths": [(1, 1, -1, 1), (1, 1.5, 1, 1), (1, 10**6, 1, 1), (), 4, "1111"],
    "mlp_ratio": [0, -4.0, math.nan, math.inf, 1e9, "4", None, 0.01],
    "focal_levels": [(2, 2, 2, 10**6), (2, 2, 2, 0.5), "2222"],
    "focal_windows": [(999, 3, 3, 3), (3, 3, 3, 0), (3, 3, 3, -3), (3.0, 3, 3, 3), 3],
    "conv_embed": ["false", 2, None],
    "post_norm": ["no"],
    "post_norm_in_modulation": ["no"],
    "normalize_modulator": ["no"],
    "output_norm": [None],
    "activation_checkpointing": ["False"],
    "lean_training": [0.5],
    "valid_context": ["True"],
    "layer_scale": [math.nan, -math.inf, "1e-4", 1e9],
    "drop_rate": [-0.1, 1.0, math.nan, "0.1"],
    "drop_path_rate": [-0.1, 1.5, math.nan],
    "patch_size": [0, -4, 4.0, 2**20],
    "stem_padding": [-1, 4, 2.0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    check_named("focalnet_nano", name, value)


def check_named(variant: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        create_backbone(variant, **{name: value})
    shown = tuple(value) if isinstance(value, list | tuple) else value
    assert repr(shown) in str(error.value)


# Arguments of one name are checked alike in all families; these are a Focal Transformer's own.
OWN = {
    "num_heads": [(1, 2, 4, 0), (1, 2, 4, -8), (1.0, 2, 4, 8), "1248", 4],
    "window_size": [8, 1, 0, -7, 7.0, "7", 999],
}
OWN_V1 = {
    "expand_size": [-1, 4, 1.5, None],
    "focal_windows": [(7, 5, 3, 0), (7, 5, 3, 2), (999, 5, 3, 1), (7.0, 5, 3, 1), 7],
}
OWN_V2 = {"top_k": [0, -1, 128.0, None, 10**9]}
TRANSFORMERS = [
    *(
        ("focal_nano", name)
        for name in BAD
        if name in inspect.signature(FocalTransformer).parameters
    ),
    *(("focal_nano", name) for name in (*OWN, *OWN_V1)),
    *(("focal_fast_tiny", name) for name in (*OWN, *OWN_V2)),
]


@pytest.mark.parametrize(("variant", "name"), TRANSFORMERS)
def test_bad_values_of_transformers_are_named(variant: str, name: str) -> None:
    for value in {**BAD, **OWN, **OWN_V1, **OWN_V2}[name]:
        check_named(variant, name, value)


def test_kernels_of_later_levels_count() -> None:
    with pytest.raises(ValueError, match="a kernel of 257, but at most 255"):
        FocalNet(depths=(1,), focal_levels=(2,), focal_windows=(255,), embed_dim=8)


def test_ends_of_the_ranges_work() -> None:
    with torch.device("meta"):
        for name in list_backbones():
            create_backbone(name)
        FocalNet(depths=(1,), focal_levels=(1,), focal_windows=(255,), embed_dim=8)
        FocalNet(depths=(1,), focal_levels=(0,), focal_windows=(1,), embed_dim=1, mlp_ratio=1)
    # The fewest hidden channels; none ended the process in the kernels.
    net = FocalNet(
        depths=(1, 1), focal_levels=(1, 1), focal_windows=(3, 3), embed_dim=8, mlp_ratio=1 / 8
    )
    assert net.layers[0].blocks[0].mlp.fc1.out_features == 1
    features = net(torch.randn(1, 3, 32, 32))
    features["stage2"].square().sum().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if "norm0" not in n)
    assert features["stage2"].isfinite().all()
