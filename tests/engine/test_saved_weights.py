"""An evaluation takes the best weights of the run whose folder it is given."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.main import with_saved_weights
from focalnet_det.experiment import RunArguments, describe
from tests.helpers.configs import RECIPE


def weights(folder: Path | None, *overrides: str) -> str:
    args = RunArguments(
        config_file=str(RECIPE),
        eval_only=True,
        output=None if folder is None else str(folder),
        opts=["train.output_dir=elsewhere", *overrides],
    )
    return with_saved_weights(describe(args), args).options.init_checkpoint


def test_the_best_weights_of_a_run_are_evaluated(tmp_path: Path) -> None:
    assert weights(tmp_path) == ""
    for name in ("model_0000099.pth", "model_final.pth", "model_ema.pth", "model_best.pth"):
        (tmp_path / name).touch()
        assert weights(tmp_path) == str(tmp_path / name)
    # What the command line names comes first.
    assert weights(tmp_path, "train.init_checkpoint=x.pth") == "x.pth"
    # A folder that is not named is not searched.
    assert weights(None) == ""
