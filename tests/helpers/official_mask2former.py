"""The stored semantic case of the official head: its weights, inputs and outputs."""

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from focalnet_det.heads.mask2former.mask2former import build_parts
from tests.helpers.paths import SHARED

FOLDER = SHARED / "refs/mask2former"
CHANNELS = {"stage1": 96, "stage2": 192, "stage3": 384, "stage4": 768}
SIZES = ((32, 40), (16, 20), (8, 10), (4, 5))
NUM_CLASSES = 150
PADDED = (128, 160)


@cache
def stored() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers and arrays of the stored case; skips where they are absent."""
    if not FOLDER.is_dir():
        pytest.skip("stored outputs are missing: no folder ../shared/refs/mask2former")
    numbers = json.loads((FOLDER / "refs.json").read_text())
    with np.load(FOLDER / "refs.npz") as file:
        return numbers, {name: torch.from_numpy(file[name]) for name in file.files}


def deterministic_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights from the names of parameters, scaled so that every part matters."""
    weights = {}
    for key, shape in shapes.items():
        state = np.random.RandomState(zlib.crc32(key.encode()))
        z = state.standard_normal(tuple(shape)).astype(np.float32)
        if len(shape) >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 1 + 0.1 * z if key.endswith("weight") else 0.1 * z
        if key.endswith("sampling_offsets.bias"):
            z = z * 20
        embeddings = ("query_feat.weight", "query_embed.weight", "level_embed.weight")
        if key.endswith((*embeddings, "level_embed")):
            z = z * 16
        if key.endswith("in_proj_weight"):
            z = z * 2.5
        if key.endswith("attn.out_proj.weight"):
            z = z * 0.4
        weights[key] = torch.from_numpy(np.asarray(z, np.float32))
    return weights


def input_shape() -> dict[str, ShapeSpec]:
    """Channels and strides of the features."""
    return {
        name: ShapeSpec(channels=width, stride=4 * 2**k)
        for k, (name, width) in enumerate(CHANNELS.items())
    }


def features() -> dict[str, Tensor]:
    """Features of two images of 128 x 160."""
    return {
        name: torch.from_numpy(
            np.random.RandomState(11 + i).standard_normal((2, width, *SIZES[i])).astype(np.float32)
        )
        for i, (name, width) in enumerate(CHANNELS.items())
    }


def official_parts(**options: Any) -> dict[str, Any]:
    """Head with the weights of the case, and criterion."""
    numbers, _ = stored()
    parts = build_parts(input_shape(), num_classes=NUM_CLASSES, **options)
    prefix = "sem_seg_head."
    weights = deterministic_weights(numbers["keys"])
    parts["sem_seg_head"].load_state_dict({k.removeprefix(prefix): v for k, v in weights.items()})
    return parts


def sampled(name: str, value: Tensor) -> tuple[Tensor, Tensor, float]:
    """Entries of a tensor that are stored, the stored ones, and the bar for their difference."""
    numbers, arrays = stored()
    expected = arrays[name].flatten()
    if expected.numel() != value.numel():
        state = np.random.RandomState(zlib.crc32(name.encode()))
        value = value.flatten()[state.randint(0, value.numel(), expected.numel())]
    return value.flatten(), expected, 20 * numbers["noise"][name][0]
