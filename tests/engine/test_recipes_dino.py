"""DINO's recipes train a step and evaluate, on data of one's own; their checkpoints predict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch

from focalnet_det.checkpoint import convert_checkpoint
from focalnet_det.engine.main import RunArguments, run
from focalnet_det.predict import Predictor
from tests.helpers.paths import CONFIGS
from tests.helpers.thin_recipes import RUN, THIN_YAML, data

LEAVES = sorted(CONFIGS.glob("*/dino_*.*"))
THIN = {
    ".py": [
        *("model.backbone.embed_dim=8", "model.backbone.depths=[1,1,1,1]", "model.queries=5"),
        *("model.channels=64", "model.encoder_layers=1", "model.decoder_layers=2"),
        *("model.feedforward=32", "model.denoising_queries=3", "train.eval_period=0"),
        *("train.checkpoint_period=0", "dataloader.train.augmentations.short_sides=[64]"),
        *(option for option in RUN if "epochs" not in option),
    ],
    ".yaml": [
        *(option for option in THIN_YAML if "FPN" not in option),
        *("MODEL.DINO.QUERIES=5", "MODEL.DINO.CHANNELS=64", "MODEL.DINO.ENCODER_LAYERS=1"),
        *("MODEL.DINO.DECODER_LAYERS=2", "MODEL.DINO.FEEDFORWARD=32", "TEST.EVAL_PERIOD=0"),
        *("MODEL.DINO.DENOISING_QUERIES=3", "SOLVER.CHECKPOINT_PERIOD=0"),
    ],
}


def options(path: Path) -> list[str]:
    found = list(THIN[path.suffix])
    if path.stem.endswith("small"):
        found.append("dataloader.train.augmentations.crop=64")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", LEAVES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_recipe_trains_a_step_and_evaluates(path: Path, shapes: Path, tmp_path: Path) -> None:
    arguments = RunArguments(
        config_file=str(path), opts=options(path), output=str(tmp_path), **data(shapes)
    )
    results = run(arguments)
    assert 0 <= results["instances_val"]["bbox"]["AP"] <= 100
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.json").open())
    # Two layers, the encoder and two denoising sets, of three losses each.
    assert sum("loss_" in key and key != "total_loss" for key in line) == 15
    assert 0 < line["total_loss"] < 100
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert len(weights["class_embed.0.bias"]) == 6
    shutil.rmtree(tmp_path)


def test_a_run_follows_the_conventions_of_its_initial_weights(shapes: Path, tmp_path: Path) -> None:
    """Trained, converted to the official names, trained on; its checkpoint predicts by itself."""
    path = CONFIGS / "Shapes-Detection/dino_focalnet_nano_small.py"
    first, second = tmp_path / "first", tmp_path / "second"
    opts = [*options(path), "train.seed=0"]
    run(
        RunArguments(
            config_file=str(path),
            opts=[*opts, "model.conventions=focalnet_dino"],
            output=str(first),
            **data(shapes),
        )
    )
    file = tmp_path / "official.pth"
    convert_checkpoint(first / "model_final.pth", file, "focalnet_dino")
    run(
        RunArguments(
            config_file=str(path),
            opts=[*opts, f"train.init_checkpoint={file}", "optimizer.lr=1e-9"],
            output=str(second),
            **data(shapes),
        )
    )
    assert "conventions: focalnet_dino" in (second / "config.yaml").read_text()
    weights = [
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (first, second)
    ]
    assert weights[0].keys() == weights[1].keys()
    name = "transformer.decoder.layers.1.cross_attn.output_proj.weight"
    torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-7)
    predictor = Predictor(second, device="cpu")
    assert predictor.model.conventions == "focalnet_dino"
    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    found = predictor(image)
    assert found.instances is not None
    assert len(found.instances) == 30  # five queries, six classes
    assert set(found.names) <= {"circle", "square", "triangle", "star", "ring", "cross"}
