"""The throughput table: what is measured once, and what stands beside the published numbers."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from focalnet_det.benchmark import throughput
from focalnet_det.benchmark.throughput import Throughput, batch_of, throughput_table


def row(name: str, size: int, rate: float) -> Throughput:
    return Throughput(
        name=name, size=size, batch=1, dtype="float32", machine="a machine",
        images_per_second=rate, parameters=28_880_380,
    )  # fmt: skip


def test_batches_have_as_many_pixels() -> None:
    assert [batch_of(size, 128) for size in (224, 448, 896)] == [128, 32, 8]
    assert batch_of(896, 1) == 1


def test_the_table_has_the_published_numbers_beside_ours() -> None:
    rows = [row("focal_tiny", 224, 12.345), row("focal_tiny", 896, 1.5), row("focal_large", 224, 2)]
    lines = throughput_table(rows, (224, 896)).splitlines()
    assert lines[0] == "Images per second, float32, on a machine:"
    assert lines[2].count("V100, published") == 2
    assert lines[4] == "| focal_tiny | 28.9 | 12.35 | 319 | 1.5 | 27 |"
    assert lines[5] == "| focal_large | 28.9 | 2 |  |  |  |"


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    options = {"base_batch": 2, "device": torch.device("cpu"), "dtype": torch.float32}
    options |= {"machine": "here", "repeats": 1, "report": lambda _: None}
    small = throughput.create_classifier("focalnet_nano")
    with mock.patch.object(throughput, "create_classifier", return_value=small) as create:
        for sizes in ((64,), (64, 96)):
            throughput.run(tmp_path, pattern="focalnet_tiny_*rf", sizes=sizes, **options)
        assert create.call_count == 4  # two variants, with a new size the second time
        throughput.run(tmp_path, pattern="focalnet_tiny_*rf", sizes=(64, 96), **options)
        assert create.call_count == 4
    table = (tmp_path / "throughput.md").read_text()
    assert table.count("\n| focalnet_tiny_") == 2
    with pytest.raises(ValueError, match="No published variant matches 'x'"):
        throughput.run(tmp_path, pattern="x", sizes=(64,), **options)
