"""The examples run; that of a Detectron2 project is trained in tests/engine/test_own_project.py."""

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.processes import run_program

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Run by other tests, or below.
ELSEWHERE = {"detectron2_project", "torchvision_detectors"}
CONFIGS = {"mask_rcnn_resnet18_timm", "upernet_convnextv2_huggingface"}


def test_torchvision_detectors_predict() -> None:
    from examples.torchvision_detectors import detectors

    small = {"embed_dim": 8, "depths": (1, 1, 1, 1), "out_channels": 64}
    for model in detectors("focalnet_nano", num_classes=3, **small):
        model.transform.min_size, model.transform.max_size = (64,), 96
        with torch.no_grad():
            (found,) = model.eval()([torch.rand(3, 60, 80)])
        assert found["boxes"].shape[1] == 4


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_configs_build_their_model(name: str) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    pytest.importorskip("timm", reason="timm is missing: make install-tests")
    pytest.importorskip("transformers", reason="transformers is missing: make install-tests")
    from focalnet_det.detectron2.library_backbones import LibraryBackbone
    from focalnet_det.experiment import RunArguments, describe
    from focalnet_det.experiment.check import skeleton

    model, problems = skeleton(
        describe(RunArguments(config_file=str(ROOT / f"examples/{name}.py")))
    )
    assert problems == []
    assert sum(isinstance(module, LibraryBackbone) for module in model.modules()) == 1


@pytest.mark.parametrize(
    "path",
    [p for p in EXAMPLES if p.stem not in ELSEWHERE | CONFIGS],
    ids=lambda path: path.stem,
)
def test_other_examples_run(path) -> None:
    done = run_program(path)
    assert done.returncode == 0, done.stderr
    assert "stride 32" in done.stdout


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples/README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in EXAMPLES)
