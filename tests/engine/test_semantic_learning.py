"""UPerNet and semantic FPN learn the generated shapes, end to end."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.data.shapes.generate import make_shapes
from focalnet_det.engine.main import RunArguments, run
from tests.helpers.paths import CONFIGS


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of a generated data set of 120 training and 20 validation images."""
    root = tmp_path_factory.mktemp("semantic")
    make_shapes(root / "shapes", train=120, val=20, size=(96, 96), seed=5, workers=1)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("method", ["upernet", "semantic_fpn"])
def test_learns_shapes(
    method: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_folder))
    sizes = ["short_side=96", "long_side=96", "crop=96"]
    opts = [
        *(f"dataloader.train.augmentations.{size}" for size in sizes),
        *("dataloader.test.0.augmentations.short_side=96", "dataloader.test.0.num_workers=0"),
        *("model.train_size=[96,96]", "schedule.iterations=150", "schedule.warmup_iterations=20"),
        *("train.device=cpu", "train.log_iterations=50", "train.seed=1"),
    ]
    path = CONFIGS / f"Shapes-SemanticSegmentation/{method}_focalnet_nano_small.py"
    results = run(RunArguments(config_file=str(path), opts=opts, output=str(tmp_path)))
    metrics = results["shapes_sem_seg_val"]["sem_seg"]
    # Chance, or one class everywhere, is below 5.
    assert metrics["mIoU"] > 30
    assert metrics["pACC"] > 40
