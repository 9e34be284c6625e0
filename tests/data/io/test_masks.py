"""Run lengths against a slow loop."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.data.io.masks import run_lengths
from tests.helpers.records import HEIGHT, MASK, WIDTH, compressed, uncompressed


def test_run_lengths_are_those_of_a_slow_loop() -> None:
    random = np.random.default_rng(0)
    masks = [(random.random((HEIGHT, WIDTH)) < share).astype(np.uint8) for share in (0.02, 0.5, 1)]
    for mask in [*masks, MASK, np.zeros((HEIGHT, WIDTH), dtype=np.uint8)]:
        runs = uncompressed(mask)["counts"]
        assert run_lengths(compressed(mask)["counts"]).tolist() == runs
        assert run_lengths(runs).tolist() == runs
    big = np.zeros((700, 900), dtype=np.uint8)  # runs that take four characters
    big[600:, 880] = 1
    assert run_lengths(compressed(big)["counts"]).tolist() == [880 * 700 + 600, 100, 19 * 700]
