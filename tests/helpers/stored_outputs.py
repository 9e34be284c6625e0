"""Stored outputs of official implementations: their files, weights and inputs."""

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.paths import SHARED


@cache
def stored(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers and arrays of a stored case; skips where they are absent."""
    folder = SHARED / "refs" / name
    if not folder.is_dir():
        pytest.skip(f"stored outputs are missing: no folder ../shared/refs/{name}")
    numbers = json.loads((folder / "refs.json").read_text())
    with np.load(folder / "refs.npz") as file:
        return numbers, {key: torch.from_numpy(file[key]) for key in file.files}


def deterministic_weights(
    shapes: Mapping[str, Sequence[int]], embeddings: tuple[str, ...]
) -> dict[str, Tensor]:
    """Weights from the names of parameters, scaled so that every part matters.

    Args:
        embeddings: what the names of parameters of magnitude 1 end in.
    """
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
        if key.endswith(embeddings):
            z = z * 16
        if key.endswith("in_proj_weight"):
            z = z * 2.5
        if key.endswith("attn.out_proj.weight"):
            z = z * 0.4
        weights[key] = torch.from_numpy(np.asarray(z, np.float32))
    return weights


def random_map(shape: Sequence[int], seed: int) -> Tensor:
    """The stored cases' features."""
    z = np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)
    return torch.from_numpy(z)


def sampled(name: str, value: Tensor, expected: Tensor) -> Tensor:
    """Entries of a tensor that are stored."""
    value = value.flatten()
    if expected.numel() == value.numel():
        return value
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return value[state.randint(0, value.numel(), expected.numel())]
