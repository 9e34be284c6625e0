"""The model zoo lists every config with what its header says.

That the parameters are those of the model is checked where every model is built, in
tests/configs/test_leaves.py.
"""

import re

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.experiment.zoo_page import published_score, starting_weights, zoo_row
from focalnet_det.resources import list_configs
from tests.helpers.configs import zoo_rows


def test_every_config_has_a_row_with_its_score() -> None:
    """If not: focalnet-det configs --zoo-page docs/zoo.md."""
    configs, rows = list_configs(), zoo_rows()
    assert sorted(rows) == sorted(configs)
    for name, (_, score, _, _, weights) in rows.items():
        assert score == (published_score(configs[name]) or "–"), name
        assert weights == starting_weights(name), name


def test_scores_are_read_from_headers() -> None:
    for text, score in {
        "Mask R-CNN, 1x: published box AP 45.9, mask AP 41.3 on COCO val.": "box AP 45.9, mask AP "
        "41.3 on COCO val",
        "Mask2Former, 100 epochs: 57.9 PQ is published (arXiv:2203.11926).": "57.9 PQ",
        "UPerNet: published mIoU 54.0, 55.4 at several scales. The published one began with "
        "weights of ImageNet-22k.": "mIoU 54.0, 55.4 at several scales",
        "FocalNet-T SRF, 300 epochs of ImageNet-1k: published top-1 82.1.": "top-1 82.1",
        "FCOS, 1x. No number is published for this recipe.": "",
    }.items():
        assert published_score(text) == score


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        # Counted on the official code: 94.75 G at 800 x 1280; 48.7 M in the official README.
        ("COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py", "48.7 M", "95 G"),
        # The published 944 G also count biases, norms and activations.
        ("ADE20K-SemanticSegmentation/upernet_focalnet_tiny_srf_160k.py", "60.8 M", "942 G"),
    ],
)
def test_rows_are_counted(name: str, parameters: str, macs: str) -> None:
    row = zoo_row(name, list_configs()[name])
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    assert cells[2] == parameters
    assert cells[3].removeprefix("backbone ") == macs
    assert cells == list(zoo_rows()[name])
    assert re.match(rf"\[.+\]\(\.\./configs/{name}\)", cells[0])
