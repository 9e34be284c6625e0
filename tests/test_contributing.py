"""CONTRIBUTING.md points at files and names that exist."""

import re

import pytest

from tests.helpers.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = sorted(set(re.findall(r"`([\w/]+\.py)(?::([A-Za-z_]\w*))?[\w.]*`", TEXT)))


def test_places_are_found() -> None:
    assert len(PLACES) > 25


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_every_place_exists(file: str, name: str) -> None:
    """Files are named from the package, from the root, or by their name in the ring's row."""
    paths = [path for path in (ROOT / "focalnet_det" / file, ROOT / file) if path.is_file()]
    paths = paths or list((ROOT / "focalnet_det").rglob(file))
    assert paths, f"{file} does not exist"
    if name:
        pattern = rf"^\s*(?:def|class) {name}\b|^{name}\b"
        assert re.search(pattern, paths[0].read_text(), re.MULTILINE), f"{file} has no {name}"
