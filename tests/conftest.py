"""Fixtures of every test: fixed seeds, one thread, and the real data where it is at hand."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels then run in NumPy; it reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real data sets beside the repository: ``../shared/data``."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are missing: no folder ../shared/data beside the checkout")
    return SHARED_DATA
