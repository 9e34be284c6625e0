"""Stored cases of mmdet's detectors with the official FocalNet: weights, input, outputs."""

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

NORM_RULES = ((r".*\.running_var", 0.5, 1.0), (r".*\.num_batches_tracked", 0.0, 0.0))


@cache
def stored(method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers and arrays of a case; skips where they are absent."""
    folder = SHARED / "refs" / method
    if not folder.is_dir():
        pytest.skip(f"stored outputs are missing: no folder ../shared/refs/{method}")
    numbers = json.loads((folder / "refs.json").read_text())[method]
    with np.load(folder / "refs.npz") as file:
        arrays = {n.removeprefix(f"{method}/"): torch.from_numpy(file[n]) for n in file.files}
    return numbers, arrays


def deterministic_weights(method: str) -> dict[str, Tensor]:
    """Weights from the official names, scaled by the rules of the case."""
    numbers, _ = stored(method)
    weights = {}
    for key, shape in numbers["keys"].items():
        state = np.random.RandomState(zlib.crc32(key.encode()))
        z = np.asarray(state.standard_normal(tuple(shape)), np.float32)
        if len(shape) >= 2:
            z = z / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            z = 1 + np.float32(0.1) * z if key.endswith("weight") else np.float32(0.1) * z
        for pattern, factor, offset in (*NORM_RULES, *numbers["rules"]):
            if re.fullmatch(pattern, key):
                z = z * np.float32(factor) + np.float32(offset)
        weights[key] = torch.from_numpy(np.asarray(z, np.float32))
        if key.endswith("num_batches_tracked"):
            weights[key] = weights[key].long()
    return weights


def image(method: str) -> Tensor:
    """Return the normalized image of the case, (1, 3, H, W)."""
    numbers, _ = stored(method)
    state = np.random.RandomState(numbers["input_seed"])
    return torch.from_numpy(state.standard_normal(numbers["input"]).astype(np.float32))


def compare(method: str, name: str, value: Tensor, tolerance: float) -> None:
    """Compare a tensor with what is stored of it: all of it, or entries and statistics."""
    numbers, arrays = stored(method)
    row, expected = numbers["tensors"][f"{method}/{name}"], arrays[name]
    assert value.numel() == np.prod(row["shape"])
    flat = value.detach().flatten()
    if row["mode"] == "sampled":
        statistics = [flat.mean(), flat.std(), flat.min(), flat.max()]
        found = [float(x) for x in statistics]
        assert found == pytest.approx(row["stat"], abs=2 * tolerance), name
        state = np.random.RandomState(zlib.crc32(f"{method}/{name}".encode()))
        flat = flat[state.randint(0, flat.numel(), expected.numel())]
    difference = (flat - expected.flatten()).abs().max()
    assert difference < tolerance, f"{name} differs by {difference:.3g}"
