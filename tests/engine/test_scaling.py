"""The learning rate follows the batch, once, and not where it is set by hand."""

import logging
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.own_data import fit_lazy, fit_yacs
from focalnet_det.engine.scaling import scale_learning_rate
from focalnet_det.experiment import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAF = CONFIGS / "COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.py"


def test_lazy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "focalnet_det")
    opts = ["dataloader.train.batch_size=4"]
    cfg = load_config(LEAF, opts)
    assert scale_learning_rate(cfg, opts) == 0.25
    assert cfg.optimizer.lr == pytest.approx(2.5e-5)
    assert "Batch 4 instead of the recipe's 16: learning rate times 0.25, 2.5e-05." in caplog.text
    assert scale_learning_rate(cfg, opts) == 1, "a saved config is not scaled again"
    assert cfg.optimizer.lr == pytest.approx(2.5e-5)
    # Data of 2 images: the batch goes from 4 to 2, and the rate with it.
    fit_lazy(cfg, 2)
    assert cfg.optimizer.lr == pytest.approx(1.25e-5)
    assert scale_learning_rate(cfg, opts) == 1


def test_yacs() -> None:
    opts = ["SOLVER.IMS_PER_BATCH", "32"]
    cfg = load_config(LEAF.with_suffix(".yaml"), opts)
    assert scale_learning_rate(cfg, opts) == 2
    assert abs(cfg.SOLVER.BASE_LR - 2e-4) < 1e-9
    fit_yacs(cfg.SOLVER, 8)
    assert abs(cfg.SOLVER.BASE_LR - 5e-5) < 1e-9
    assert scale_learning_rate(cfg, opts) == 1


@pytest.mark.parametrize("opts", [
    [], ["dataloader.train.batch_size=4", "optimizer.lr=1e-3"], ["train.recipe_batch=0"],
])  # fmt: skip
def test_left_alone(opts: list[str]) -> None:
    cfg = load_config(LEAF, opts)
    before = cfg.optimizer.lr
    assert scale_learning_rate(cfg, opts) == 1
    assert cfg.optimizer.lr == before
