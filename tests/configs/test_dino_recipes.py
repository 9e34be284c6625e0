"""DINO's recipes: complete, and with the published settings."""

import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import instantiate

from focalnet_det.experiment import load_config
from focalnet_det.heads.dino import DINO
from tests.configs.test_leaves import build_without_memory, groups, read
from tests.helpers.paths import CONFIGS

LEAVES = sorted(CONFIGS.glob("*/dino_*.py"))
PUBLISHED = [p for p in LEAVES if not p.stem.endswith("small")]
# Variant, scales, epochs: published box AP on COCO val.
SCORES = {
    "large_fl3_4scale_12ep": "57.5",
    "large_fl3_4scale_36ep": "58.3",
    "large_fl4_4scale_12ep": "58.0",
    "large_fl4_5scale_12ep": "58.5",
    "large_fl4_5scale_36ep_1200": "63.5",
    "huge_fl4_5scale_36ep_1200": "64.3",
}


def test_recipes_are_complete() -> None:
    found = {p.stem.removeprefix("dino_focalnet_") for p in PUBLISHED}
    sizes = {f"{size}_lrf_4scale_12ep" for size in ("tiny", "small", "base")}
    assert found == sizes | set(SCORES) | {"large_fl4_5scale_36ep"}
    small = {p.parent.name for p in LEAVES if p.stem == "dino_focalnet_nano_small"}
    assert small == {"COCO-Detection", "Shapes-Detection"}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_recipe_is_as_published(path: Path) -> None:
    name = path.stem.removeprefix("dino_focalnet_")
    header = path.read_text().split('"""')[1]
    assert ("box AP" in header) == (name in SCORES)
    assert SCORES.get(name, "no score is published") in header
    experiment = read(path)
    model = build_without_memory(experiment.model)
    assert isinstance(model, DINO)
    scales, epochs = (int(x) for x in re.findall(r"(\d+)(?:scale|ep)", name))
    assert len(model.transformer.level_embed) == scales
    assert len(model.input_proj.in_features) == scales - 1
    assert model.transformer.tgt_embed.num_embeddings == 900
    assert (model.num_classes, model.max_detections_per_image) == (80, 300)
    official = name.endswith("1200")
    assert model.conventions == ("focalnet_dino" if official else "detrex")
    rates = sorted({row[1] for row in groups(experiment, model)})
    assert rates == pytest.approx([1e-5, 1e-4])
    exempt = {name for row in groups(experiment, model) if row[2] == 0 for name in row[4]}
    decayed = {name for row in groups(experiment, model) if row[2] == 1e-4 for name in row[4]}
    norms = {"transformer.decoder.norm.weight", "input_proj.3.1.bias", "backbone.norm2.weight"}
    assert norms <= (decayed if official else exempt)
    assert {"transformer.level_embed", "input_proj.3.0.bias", "label_enc.weight"} <= decayed
    assert experiment.options.clip_norm == 0.1
    length, drop = {12: (90_000, 82_500), 36: (270_000, 225_000)}[epochs]
    assert experiment.schedule.max_iter(1) == length
    course = experiment.schedule.multiplier(1)
    assert course(0.0) == 1
    assert course((drop - 2) / length) == 1
    assert course((drop + 2) / length) == pytest.approx(0.1)
    cfg = load_config(path, [])
    assert not cfg.dataloader.train.filter_empty
    side = instantiate(cfg.dataloader.test[0].augmentations)[0]
    assert (side.short_edge_length[0], side.max_size) == (1200, 2000) if official else (800, 1333)
    large = "tiny" not in name and "small" not in name and "base" not in name
    assert model.backbone.layers[0].activation_checkpointing == large
