"""The generated data set in COCO's layout."""

import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from focalnet_det.data.panoptic.coco_panoptic import prepare_coco_panoptic
from tests.helpers.paths import ROOT


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64)


FORMS = ("panoptic_stuff", "panoptic_semseg")

SPLITS = ("train2017", "val2017")


def prepare(coco: Path, workers: int = 1) -> int:
    return prepare_coco_panoptic(coco, forms=FORMS, splits=SPLITS, workers=workers)


def run_script(name: str, *arguments: object) -> int:
    """Exit status of a script in this process, which has the imports done."""
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0
