"""The learning rate follows the batch, once, and not where it is set by hand."""

import logging
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.experiment import RunArguments, describe
from tests.helpers.paths import CONFIGS

LEAF = CONFIGS / "COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.py"


@pytest.mark.parametrize(
    ("suffix", "opts", "expected"),
    [
        (".py", ["dataloader.train.batch_size=4"], 2.5e-5),
        (".yaml", ["SOLVER.IMS_PER_BATCH", "4"], 2.5e-5),
        (".yaml", ["SOLVER.IMS_PER_BATCH=32"], 2e-4),
        (".py", [], 1e-4),
        (".py", ["dataloader.train.batch_size=4", "optimizer.lr=1e-3"], 1e-3),
        (".yaml", ["SOLVER.IMS_PER_BATCH=4", "SOLVER.BASE_LR=1e-3"], 1e-3),
        (".py", ["train.recipe_batch=0", "dataloader.train.batch_size=4"], 1e-4),
    ],
)
def test_rate_follows_the_batch_once(
    suffix: str,
    opts: list[str],
    expected: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "focalnet_det")
    experiment = describe(RunArguments(config_file=str(LEAF.with_suffix(suffix)), opts=opts))
    assert experiment.settings.learning_rate == pytest.approx(expected)
    scaled = "instead of the recipe's 16: the learning rate is scaled by" in caplog.text
    assert scaled == (expected in (2.5e-5, 2e-4))
    saved = tmp_path / "config.yaml"
    saved.write_text(experiment.config_text)
    again = describe(RunArguments(config_file=str(saved)))
    assert again.settings.learning_rate == pytest.approx(expected), "scaled twice"
