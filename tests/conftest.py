"""Fixtures of every test: fixed seeds, one thread, and the real data where it is at hand."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from focalnet_det.ops.cpu import capabilities

pytest.register_assert_rewrite("tests.helpers")  # before anything imports it

from tests.helpers.paths import SHARED  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels then run in NumPy; it reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = SHARED / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves long proofs to `make soak`."""
    if "SOAK" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="a long proof: make soak"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=capabilities.LEVELS)
def every_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Types are chosen as on a CPU with one set of instructions after the other; its name."""
    chosen = capabilities.LEVELS[request.param].capabilities
    monkeypatch.setattr(capabilities, "cpu", lambda: chosen)
    return str(request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real data sets beside the repository: ``../shared/data``."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are missing: no folder ../shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture
def forget_data_sets() -> Iterator[None]:
    """Takes the data sets that a test registers out of Detectron2's catalogs afterwards."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before[0]:
        DatasetCatalog.remove(name)
    for name in set(MetadataCatalog.list()) - before[1]:
        MetadataCatalog.pop(name, None)
