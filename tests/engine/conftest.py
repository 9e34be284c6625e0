"""A few generated images and a run folder for tests of the engine."""

from pathlib import Path

import pytest

from focalnet_det.data.shapes.generate import make_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data set of 8 training and 4 validation images of 96x96 px."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes(root, train=8, val=4, size=(96, 96), seed=3, workers=1)
