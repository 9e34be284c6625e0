"""The stored case of mmdet's ATSS with the official backbone: weights, input and outputs."""

import json
import re
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.paths import SHARED

FOLDER = SHARED / "refs/atss"
ROUNDING = (
    (r".*\.running_var", 0.5, 1.0),
    (r".*\.num_batches_tracked", 0.0, 0.0),
)


@cache
def stored() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers and arrays of the stored case; skips where they are absent."""
    if not FOLDER.is_dir():
        pytest.skip("stored outputs are missing: no folder ../shared/refs/atss")
    numbers = json.loads((FOLDER / "refs.json").read_text())["atss"]
    with np.load(FOLDER / "refs.npz") as file:
        return numbers, {name: torch.from_numpy(file[name]) for name in file.files}


def weights() -> dict[str, Tensor]:
    """The weights, under mmdet's names, from the names alone."""
    numbers, _ = stored()
    found = {}
    for key, shape in numbers["keys"].items():
        state = np.random.RandomState(zlib.crc32(key.encode()))
        z = state.standard_normal(tuple(shape)).astype(np.float32)
        if len(shape) >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = 1 + 0.1 * z if key.endswith("weight") else 0.1 * z
        for pattern, factor, shift in (*ROUNDING, *numbers["rules"]):
            if re.fullmatch(pattern, key):
                z = z * factor + shift
        found[key] = torch.from_numpy(np.asarray(z, np.float32))
    return found


def image() -> Tensor:
    """The normalized image, (1, 3, 256, 320)."""
    numbers, _ = stored()
    state = np.random.RandomState(numbers["input_seed"])
    return torch.from_numpy(state.standard_normal(tuple(numbers["input"])).astype(np.float32))


def difference(name: str, value: Tensor) -> float:
    """Return the largest difference of a tensor from what is stored of it."""
    numbers, arrays = stored()
    assert list(value.shape) == numbers["tensors"][f"atss/{name}"]["shape"]
    expected = arrays[f"atss/{name}"]
    if numbers["tensors"][f"atss/{name}"]["mode"] == "sampled":
        state = np.random.RandomState(zlib.crc32(f"atss/{name}".encode()))
        value = value.flatten()[state.randint(0, value.numel(), len(expected))]
    return float((value - expected).abs().max())
