"""A few small images."""

from pathlib import Path

import pytest

from tests.helpers import bad_files


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bad_files.write_images(tmp_path_factory.mktemp("bad") / "images")
