"""The generated data set with panoptic segments, and in COCO's layout."""

from pathlib import Path

import pytest

from focalnet_det.data.shapes.generate import make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    # Enough images that some hold a crowd, and some a smudge of no class.
    return make_shapes(root, train=60, val=3, size=(96, 80), seed=3, workers=1)


@pytest.fixture(scope="module")
def coco(shapes: Path) -> Path:
    """The shapes in COCO's layout."""
    root = shapes.parent / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").symlink_to(shapes / "images" / split)
        (root / f"panoptic_{split}2017").symlink_to(shapes / f"panoptic_{split}")
        for kind in ("panoptic", "instances"):
            target = root / f"annotations/{kind}_{split}2017.json"
            target.symlink_to(shapes / f"annotations/{kind}_{split}.json")
    return root
